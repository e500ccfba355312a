"""One decoder layer: the plain form that autograd differentiates, and the parts it is made of.

Module names are those of Hugging Face checkpoints. The hand-written form of the same layer is `layer_node`; cache and
masks are the model's, handed in as ``attend``.

Shapes: leading dimensions as they come, D width, H query heads, G key/value heads, d head size, F feed-forward width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jebi.kernels.rms_norm import rms_norm
from jebi.kernels.rope import rope
from jebi.kernels.swiglu import swiglu
from jebi.nn.linear import Linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(..., H, d), (..., G, d), (..., G, d) -> (..., H, d), rotary positions already applied."""


@dataclass(frozen=True)
class LayerShape:
    """The sizes and flags of one layer; the family of a checkpoint decides them."""

    width: int
    """D, the size of the residual stream."""
    heads: int
    """H, query heads."""
    kv_heads: int
    """G, key and value heads; H is a multiple of it."""
    head_dim: int
    """d, the size of one head."""
    ffn: int
    """F, the width of the gated feed-forward block."""
    eps: float
    """Added to the mean square in the norms."""
    attention_bias: bool
    """Whether q, k, v and o have biases."""
    mlp_bias: bool
    """Whether gate, up and down have biases."""


class Norm(nn.Module):
    """The frozen weight of a norm; the layer does the arithmetic."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device="meta"), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension; differentiable by ``x``."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """The four projections of a layer's attention."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype):
        super().__init__()
        inner, kv_inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.q_proj = Linear(shape.width, inner, shape.attention_bias, dtype)
        self.k_proj = Linear(shape.width, kv_inner, shape.attention_bias, dtype)
        self.v_proj = Linear(shape.width, kv_inner, shape.attention_bias, dtype)
        self.o_proj = Linear(inner, shape.width, shape.attention_bias, dtype)


class FeedForward(nn.Module):
    """The three projections of a layer's gated feed-forward block."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Linear(shape.width, shape.ffn, shape.mlp_bias, dtype)
        self.up_proj = Linear(shape.width, shape.ffn, shape.mlp_bias, dtype)
        self.down_proj = Linear(shape.ffn, shape.width, shape.mlp_bias, dtype)


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        self.self_attn = Attention(shape, dtype)
        self.mlp = FeedForward(shape, dtype)
        self.input_layernorm = Norm(shape.width, shape.eps, dtype)
        self.post_attention_layernorm = Norm(shape.width, shape.eps, dtype)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """The layer in differentiable torch; every option works here.

        Args:
            hidden: (..., D).
            cos: (..., d), the tokens' rotary table.
            sin: like ``cos``.
            attend: attention over whatever layout the caller has.
        """
        x = self.input_layernorm(hidden)
        q, k, v = (
            self.heads(proj(x)) for proj in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        )
        mixed = attend(rope(q, cos, sin), rope(k, cos, sin), v)
        hidden = hidden + self.self_attn.o_proj(mixed.flatten(-2))
        x = self.post_attention_layernorm(hidden)
        out: Tensor = hidden + self.mlp.down_proj(swiglu(self.mlp.gate_proj(x), self.mlp.up_proj(x)))
        return out

    def heads(self, x: Tensor) -> Tensor:
        """(..., heads * d) -> (..., heads, d)."""
        headed: Tensor = x.unflatten(-1, (-1, self.shape.head_dim))
        return headed

    def projections(self) -> Iterator[tuple[str, Linear]]:
        """The seven linear maps with their names in the checkpoint, relative to the layer."""
        for block in ("self_attn", "mlp"):
            for name, module in self.get_submodule(block).named_children():
                assert isinstance(module, Linear)
                yield f"{block}.{name}", module
