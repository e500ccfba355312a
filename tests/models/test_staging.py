"""``models.staging``: tensors are safetensors' own to the bit, whatever they are cut into; memory is the buffers'.

Where there is a card, the same tests read onto it too.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jebi.errors import WeightsError
from jebi.models import staging
from jebi.models.files import _DTYPES, Folder, StoredTensor
from jebi.models.loading import load_model

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
pytestmark = pytest.mark.parametrize("device", DEVICES)


def bits(tensor: torch.Tensor) -> bytes:
    """Its bytes, so that NaNs are compared too."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def folder_of(path: Path, **files: dict[str, torch.Tensor]) -> Folder:
    """A checkpoint folder of these safetensors files; more than one are joined by an index."""
    (path / "config.json").write_text("{}")
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    if len(files) > 1:
        places = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return Folder(path)


def read_all(tensors: Iterator[StoredTensor], device: str) -> dict[str, torch.Tensor]:
    read = {stored.name: stored.read() for stored in staging.staged(tensors, torch.device(device))}
    assert {tensor.device.type for tensor in read.values()} == {device}
    return {name: tensor.cpu() for name, tensor in read.items()}


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers of 1,001 bytes: numbers are cut where they end, and a tensor needs many."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", 1001)


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("name", _DTYPES)
def test_every_dtype(tmp_path: Path, device: str, name: str) -> None:
    drawn = torch.randint(0, 256, (3, 41, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = drawn > 127 if name == "BOOL" else drawn.view(_DTYPES[name])
    read = read_all(folder_of(tmp_path, model={"a": values}).tensors(), device)["a"]
    expected = load_file(tmp_path / "model.safetensors")["a"]
    assert (read.dtype, read.shape) == (expected.dtype, expected.shape) == (values.dtype, values.shape)
    assert bits(read) == bits(expected)


@pytest.mark.parametrize("buffer", [7, 1000, 4096, 2**24])
def test_shards_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, buffer: int) -> None:
    """Also tensors without numbers, of no dimension, and of a buffer's size exactly."""
    monkeypatch.setattr(staging, "BUFFER_BYTES", buffer)
    shapes = {"empty": (0, 5), "scalar": (), "one": (1,), "full": (250,), "two": (500,), "odd": (3, 167), "last": (31,)}
    drawn = {name: torch.randn(shape) for name, shape in shapes.items()}
    names = sorted(drawn)
    files = {"first": names[::2], "second": names[1::2]}
    folder = folder_of(tmp_path, **{file: {name: drawn[name] for name in held} for file, held in files.items()})
    read = read_all(folder.tensors(), device)
    assert list(read) == names[::2] + names[1::2]
    assert all(torch.equal(read[name], drawn[name]) for name in names)


def test_a_tensor_of_unknown_place_is_read_as_it_was(tmp_path: Path, device: str) -> None:
    tensors = list(folder_of(tmp_path, model={name: torch.randn(9) for name in "abc"}).tensors())
    elsewhere = torch.randn(3, device=device)
    tensors.insert(1, StoredTensor("d", (3,), tmp_path, lambda: elsewhere))
    read = read_all(iter(tensors), device)
    assert list(read) == ["a", "d", "b", "c"]
    assert torch.equal(read.pop("d"), elsewhere.cpu())
    expected = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(read[name], expected[name]) for name in "abc")


def test_readers_stay_ahead_by_the_buffers_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """And a buffer is filled again only after what was in it has been copied, or the numbers were others."""
    monkeypatch.setattr(staging, "BUFFERS", 3)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 400)
    begun: list[int] = []
    fill = staging._Buffer.fill

    def watched(buffer: staging._Buffer, piece: staging._Piece) -> None:
        begun.append(piece.start)
        fill(buffer, piece)

    monkeypatch.setattr(staging._Buffer, "fill", watched)
    drawn = {f"{index:02}": torch.randn(250) for index in range(20)}
    folder = folder_of(tmp_path, model=drawn)
    for taken, stored in enumerate(staging.staged(folder.tensors(), torch.device(device))):
        assert len(begun) <= 3 * taken + 3
        assert torch.equal(stored.read().cpu(), drawn[stored.name])
    assert len(begun) == 3 * 20


class Staged(Folder):
    """A checkpoint as `load_model` reads it onto a card, wherever it is to go."""

    device = "cpu"
    shortened_to: int | None = None

    def tensors(self) -> Iterator[StoredTensor]:
        listed = list(super().tensors())
        if self.shortened_to is not None:
            os.truncate(listed[0].file, self.shortened_to)
        yield from staging.staged(listed, torch.device(self.device))


@pytest.mark.usefixtures("small_buffers")
def test_a_model(tiny_llama, load, device: str) -> None:
    files = Staged(tiny_llama("biased"))
    files.device = device
    ours = load_model(files, files.config(), torch.float32, torch.device(device), "dense").state_dict()
    expected = load(tiny_llama("biased")).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name].cpu(), expected[name]) for name in expected)


@pytest.mark.usefixtures("small_buffers")
def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path, tiny_llama, device: str) -> None:
    """Its header was sound, so that only the read can tell; file and tensor are named as for any that is broken."""
    for file in tiny_llama().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    files = Staged(tmp_path)
    files.device, files.shortened_to = device, 100_000
    message = rf"'{tmp_path / 'model.safetensors'}': tensor 'model\..*' cannot be used: the file has become shorter"
    with pytest.raises(WeightsError, match=message):
        load_model(files, files.config(), torch.float32, torch.device(device), "nf4")
