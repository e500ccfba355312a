"""``quant.nf4`` against bitsandbytes: bytes, dense values and state dicts; and how the module moves."""

import io

import pytest
import torch
from torch import Tensor

from jebi.errors import WeightsError
from jebi.quant.nf4 import NF4Weight, from_bitsandbytes, to_bitsandbytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whole blocks; a short last block; an odd row length; an odd number of values; one value; more than a stretch.
SHAPES = ((128, 576), (33, 130), (66, 63), (65, 63), (1, 1), (500, 1000))


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32, scale: float = 0.05) -> Tensor:
    weight = scale * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    weight.view(-1)[70:200] = 0.0  # at least one block of zeros
    return weight.to(dtype)


def bnb_quantize(bnb, weight: Tensor):
    return bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_values_equal_bitsandbytes(bnb, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    for scale in (0.05, 1e-36, 0.0):
        weight = matrix(shape, dtype, scale)
        packed, state = bnb_quantize(bnb, weight)
        ours = NF4Weight.quantize(weight)
        assert (ours.shape, ours.dtype) == (shape, dtype)
        assert torch.equal(ours.packed, packed.view(-1))
        assert torch.equal(ours.absmax, state.absmax)
        assert torch.equal(ours.nested_absmax, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset)
        for state.dtype in DTYPES:
            # Its odd shapes go through a compiled function; compiling takes seconds and changes no value.
            # A one-row `packed` would be taken for the transposed layout, so such a result is turned back.
            with torch.compiler.set_stance("force_eager"):
                expected = bnb.functional.dequantize_4bit(packed, state).view(shape)
            assert torch.equal(ours.dense(state.dtype), expected)


def test_thresholds_between_levels_round_as_bitsandbytes(bnb) -> None:
    levels = bnb.functional.get_4bit_type("nf4", device="cpu")
    middles = (levels[1:] + levels[:-1]) / 2
    ones = torch.ones(15)
    values = torch.cat([middles, middles.nextafter(ones), middles.nextafter(-ones), levels, torch.ones(3)])
    weight = torch.cat([values, torch.linspace(-1, 1, 2**18 - 64)]).view(-1, 64)
    weight[:, 0] = 1.0
    assert torch.equal(NF4Weight.quantize(weight).packed, bnb_quantize(bnb, weight)[0].view(-1))


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_other_block_sizes(bnb, block: int) -> None:
    weight = matrix((96, 130))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=block)
    ours = NF4Weight.quantize(weight, block)
    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax, state.absmax)
    with torch.compiler.set_stance("force_eager"):
        expected = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(ours.dense(torch.float32), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_fills_a_slice_and_nothing_else(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    ours = NF4Weight.quantize(matrix(shape))
    rows, columns = shape
    for larger in (torch.full((rows + 2, columns + 3), 7.0), torch.full((columns + 3, rows + 2), 7.0).t()):
        buffer = larger.to(dtype)
        inner = buffer[1:-1, 1:-2]
        assert ours.dense(dtype, out=inner) is inner
        assert torch.equal(inner, ours.dense(dtype))
        inner.fill_(7.0)
        assert (buffer == 7.0).all()


def test_transposed_weight_is_read_by_rows() -> None:
    weight = matrix((96, 128))
    columns_first = weight.t().contiguous().t()
    assert torch.equal(NF4Weight.quantize(columns_first).packed, NF4Weight.quantize(weight).packed)


def test_state_dict_is_linear4bits(bnb) -> None:
    weight = matrix((48, 130), torch.bfloat16)
    layer = bnb.nn.Linear4bit(130, 48, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.to("cpu")  # quantises
    expected = layer.state_dict()
    ours = to_bitsandbytes(NF4Weight.quantize(weight))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name

    back = from_bitsandbytes({f"a.{name}": tensor for name, tensor in expected.items()}, "a.weight")
    assert (back.shape, back.dtype, back.block) == ((48, 130), torch.bfloat16, 64)
    assert torch.equal(back.dense(torch.float32), NF4Weight.quantize(weight).dense(torch.float32))

    theirs = bnb.nn.Params4bit.from_prequantized(
        data=ours["weight"],
        quantized_stats={name: tensor for name, tensor in ours.items() if name != "weight"},
        device="cpu",
    )
    dense = bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(dense, back.dense(torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("weight.nested_absmax"), "nested_absmax is missing"),
        (lambda tensors: tensors.update({"weight.absmax": tensors["weight.absmax"][1:]}), "another size"),
        (lambda tensors: tensors["weight.quant_map"].mul_(2), "other levels"),
        (lambda tensors: tensors["weight.quant_state.bitsandbytes__nf4"].fill_(0), "damaged"),
    ],
)
def test_wrong_state_dicts_are_refused(change, message: str) -> None:
    tensors = to_bitsandbytes(NF4Weight.quantize(matrix((32, 64))))
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        from_bitsandbytes(tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_single_quantisation(bnb, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    packed, state = bnb.functional.quantize_4bit(matrix(shape, dtype), quant_type="nf4")
    tensors = {"weight": packed} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    ours = from_bitsandbytes(tensors)
    assert ours.nested_absmax is None
    assert ours.nbytes == packed.nbytes + state.absmax.nbytes
    with torch.compiler.set_stance("force_eager"):
        expected = bnb.functional.dequantize_4bit(packed, state).view(shape)
    assert torch.equal(ours.dense(dtype), expected)
    assert ours.half().absmax.dtype == torch.float32
    written = to_bitsandbytes(ours)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_scales_of_another_dtype_than_stated_are_refused() -> None:
    tensors = to_bitsandbytes(NF4Weight.quantize(matrix((32, 64))))
    tensors["weight.absmax"] = tensors["weight.absmax"].float()
    with pytest.raises(WeightsError, match=r"absmax is of dtype torch.float32, which does not fit"):
        from_bitsandbytes(tensors)


def test_another_size_of_nested_blocks_is_refused() -> None:
    tensors = to_bitsandbytes(NF4Weight.quantize(matrix((32, 64))))
    state = "weight.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[state].tolist()).replace(b'"nested_blocksize": 256', b'"nested_blocksize": 128')
    tensors[state] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(WeightsError, match="doubly quantised in blocks of 128, not 256; load the unquantised model"):
        from_bitsandbytes(tensors)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = matrix((3, 50))
    weight[2, 49] = bad
    with pytest.raises(WeightsError, match="NaN or infinite"):
        NF4Weight.quantize(weight)


def test_casts_leave_the_buffers_alone_and_moves_do_not() -> None:
    weight = matrix((40, 64))
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), NF4Weight.quantize(weight))
    expected = module[1].dense(torch.float32)
    for cast in (module.half, module.bfloat16, module.double, lambda: module.to("cpu", torch.bfloat16)):
        cast()
        assert torch.equal(module[1].dense(torch.float32), expected)
        assert module[1].nested_absmax.dtype == module[1].offset.dtype == torch.float32
    assert module[0].weight.dtype == torch.bfloat16
    module.to("meta", torch.float16)
    assert {buffer.device.type for buffer in module[1].buffers()} == {"meta"}
    assert module[1].offset.dtype == torch.float32


def test_state_dict_round_trip_and_size() -> None:
    weight = NF4Weight.quantize(matrix((256, 512)))
    assert weight.nbytes == 65536 + 2048 + 8 * 4 + 4
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    file.seek(0)
    other = NF4Weight.quantize(torch.zeros(256, 512))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.dense(torch.float32), weight.dense(torch.float32))
    assert "shape=(256, 512)" in repr(other)


def test_error_is_that_of_nf4() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    error = NF4Weight.quantize(weight).dense(torch.float32) - weight
    assert 0.08 < error.std() < 0.11  # of a normal distribution's unit spread, at blocks of 64
