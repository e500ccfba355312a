"""bitsandbytes' ``Linear4bit`` and jebi's ``Linear`` on the same bytes: forward, and backward to the input.

That both make the same bytes of a weight is in tests/quant/test_nf4.py.
"""

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from jebi.nn.linear import Linear, backward_input, project
from jebi.quant.nf4 import from_bitsandbytes

TOKENS, INPUTS, OUTPUTS = 37, 192, 128

Check = Callable[[str, Tensor, Tensor, Tensor], None]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def twins(dtype: torch.dtype) -> tuple[bitsandbytes.nn.Linear4bit, Linear]:
    """One quantised map in both packages; jebi's is read from bitsandbytes' state."""
    theirs = bitsandbytes.nn.Linear4bit(
        INPUTS, OUTPUTS, bias=True, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    weight, bias = draw(0, OUTPUTS, INPUTS) * INPUTS**-0.5, draw(1, OUTPUTS)
    theirs.load_state_dict({"weight": weight.to(dtype), "bias": bias.to(dtype)})
    theirs = theirs.to("cpu")  # which quantises
    assert theirs.weight.dtype == torch.uint8
    ours = Linear(INPUTS, OUTPUTS, True, dtype)
    ours.store(from_bitsandbytes(theirs.state_dict(), "weight"))
    ours.bias = nn.Parameter(theirs.bias.detach().clone(), requires_grad=False)
    return theirs, ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(dtype: torch.dtype, at_most_twice: Check) -> None:
    theirs, ours = twins(dtype)
    values, dy = draw(2, TOKENS, INPUTS).to(dtype), draw(3, TOKENS, OUTPUTS).to(dtype)
    with torch.no_grad():
        weight = bitsandbytes.functional.dequantize_4bit(theirs.weight.data, theirs.weight.quant_state)
        assert torch.equal(ours.dense(), weight.to(dtype))
    exact_y = values.double() @ weight.double().t() + theirs.bias.detach().double()
    exact_dx = dy.double() @ weight.double()

    their_x, our_x = (values.clone().requires_grad_() for _ in range(2))
    their_y, our_y = theirs(their_x), ours(our_x)
    their_y.backward(dy)
    our_y.backward(dy)
    assert their_x.grad is not None
    assert our_x.grad is not None
    at_most_twice("forward", our_y.detach(), their_y.detach(), exact_y)
    at_most_twice("backward", our_x.grad, their_x.grad, exact_dx)

    by_hand, _ = project(ours, values)
    at_most_twice("forward by hand", by_hand, their_y.detach(), exact_y)
    dx, _ = backward_input(ours, dy)
    assert dx is not None
    at_most_twice("backward by hand", dx, their_x.grad, exact_dx)
