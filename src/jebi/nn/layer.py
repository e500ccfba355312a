"""One decoder layer: the plain form that autograd differentiates, and the parts it is made of.

Module names are those of Hugging Face checkpoints. The hand-written form of the same layer is `layer_node`; cache and
masks are the model's, handed in as ``attend``.

Shapes: leading dimensions as they come, D width, H query heads, G key/value heads, d head size, F feed-forward width.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jebi.kernels.glu import glu
from jebi.kernels.rms_norm import rms_norm, rms_norm_lean
from jebi.kernels.rope import rope
from jebi.nn.base_product import BaseProduct
from jebi.nn.few_rows_group import FewRowsGroup
from jebi.nn.group import Group, Separate, Stacked, stacks
from jebi.nn.linear import Linear
from jebi.nn.shape import LayerShape
from jebi.nn.sharding import Shard

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(..., H, d), (..., G, d), (..., G, d) -> (..., H, d), rotary positions already applied."""


def stream_scale(shape: LayerShape, dtype: torch.dtype) -> float:
    """What the residual stream is carried at: itself, but in float16 at 2**-5 of it.

    float16 ends at 65,504, which ``act(gate) * up`` and the stream of real models go beyond at single tokens (massive
    activations, arXiv:2402.17762). Norms undo a factor on the stream, ``eps`` shrunk with it; so it is enough that the
    embedding and what each block adds are scaled: there the values and the gated product are, and no map is touched.
    A power of two costs no digits above 2e-3, and below that less than 1e-6. A block that ends in a bias would need it
    scaled too; such models are carried as they are.
    """
    return 2.0**-5 if dtype == torch.float16 and not (shape.o_bias or shape.mlp_bias) else 1.0


class Norm(nn.Module):
    """The weight of a norm; float32 where it is trained."""

    def __init__(self, width: int, shape: LayerShape, dtype: torch.dtype, scale: float = 1.0):
        """On the meta device; what it norms is ``scale`` times what the checkpoint's norm would see."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device="meta"), requires_grad=False)
        self.eps, self.unit_offset = shape.eps * scale**2, shape.unit_offset

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last dimension; differentiable."""
        return rms_norm(x, self.weight, self.eps, self.unit_offset)

    def lean(self, x: Tensor) -> Tensor:
        """The same, keeping less for the backward."""
        return rms_norm_lean(x, self.weight, self.eps, self.unit_offset)


class Attention(nn.Module):
    """The projections of a layer's attention, and the norms of its queries and keys where it has them."""

    o_proj: Linear

    def __init__(self, shape: LayerShape, dtype: torch.dtype):
        super().__init__()
        for one in shape.attention_maps:
            setattr(self, one.name, Linear(one.inputs, one.outputs, one.bias, dtype))
        self.q_norm = Norm(shape.head_dim, shape, dtype) if shape.qk_norm else None
        self.k_norm = Norm(shape.head_dim, shape, dtype) if shape.qk_norm else None


class FeedForward(nn.Module):
    """The projections of a layer's gated feed-forward block."""

    down_proj: Linear

    def __init__(self, shape: LayerShape, dtype: torch.dtype):
        super().__init__()
        for one in shape.feed_forward_maps:
            setattr(self, one.name, Linear(one.inputs, one.outputs, one.bias, dtype))


@dataclass(frozen=True)
class LayerGroups:
    """A layer's maps by their inputs."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group

    def stacked(self) -> Iterator[Stacked]:
        """Those that are laid together."""
        for group in (self.qkv, self.o, self.gate_up, self.down):
            if isinstance(group, Stacked):
                yield group


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual."""

    input_layernorm: Norm
    post_attention_layernorm: Norm

    def __init__(self, shape: LayerShape, dtype: torch.dtype):
        super().__init__()
        self.shape = shape
        self.scale = scale = stream_scale(shape, dtype)
        self.self_attn = Attention(shape, dtype)
        self.mlp = FeedForward(shape, dtype)
        self.input_layernorm = Norm(shape.width, shape, dtype, scale)
        self.post_attention_layernorm = Norm(shape.width, shape, dtype, scale)
        if shape.sandwich:
            self.pre_feedforward_layernorm = Norm(shape.width, shape, dtype, scale)
            self.post_feedforward_layernorm = Norm(shape.width, shape, dtype, scale)
        self.stacked: LayerGroups | None = None
        """Its maps laid together for a card, where they are."""
        self.shard: Shard | None = None
        """This process's part of it, where several share it."""
        self.answering: LayerGroups | None = None
        """Likewise to answer with. Apart, so that whole rows are computed to the bit as they were before."""
        self.few_rows: list[FewRowsGroup] | None = None
        """The same groups in order, for single tokens of few rows (`few_rows_step`), where they are laid so."""

    def groups(self) -> LayerGroups:
        """Its maps by their inputs, as the hand-written form calls them."""
        if self.stacked is not None:
            return self.stacked
        o, down = [self.self_attn.o_proj], [self.mlp.down_proj]
        return LayerGroups(Separate(self.qkv()), Separate(o), Separate(self.gate_up()), Separate(down))

    def stack(self, base_of: Callable[[list[Linear]], BaseProduct], answering: bool = False) -> None:
        """Lay its maps together, where `nn.group.stacks` allows; ``base_of`` says how their weights are held."""
        if self.stackable(answering):
            # To train on a CPU they are stacked in tests alone, for what a card does.
            apart = not answering or self.self_attn.o_proj.device().type == "cuda"
            groups = LayerGroups(*(Stacked(maps, base_of(maps), apart) for maps in self._maps()))
            if answering:
                self.answering = groups
            else:
                self.stacked = groups

    def stackable(self, answering: bool = False) -> bool:
        """Whether its maps can be laid together, to train or only to answer."""
        return all(stacks(maps, answering) for maps in self._maps())

    def dense_values(self) -> int:
        """How many numbers its maps' weights hold that are not packed."""
        weights = (linear.weight for _, linear in self.projections())
        return sum(weight.numel() for weight in weights if isinstance(weight, nn.Parameter))

    def _maps(self) -> list[list[Linear]]:
        return [self.qkv(), [self.self_attn.o_proj], self.gate_up(), [self.mlp.down_proj]]

    def forward(self, hidden: Tensor, tables: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """The layer in differentiable torch; every option works here.

        Args:
            hidden: (..., D).
            tables: cosines and sines of the tokens' rotary positions, each (..., at most d).
            attend: attention over whatever layout the caller has.
        """
        shape = self.shape
        x = self.input_layernorm(hidden)
        q, k, v = (self.heads(y) for y in parts([p(x) for p in self.qkv()], shape.qkv_sizes))
        if self.self_attn.q_norm is not None and self.self_attn.k_norm is not None:
            q, k = self.self_attn.q_norm(q), self.self_attn.k_norm(k)
        mixed = attend(rope(q, *tables), rope(k, *tables), self.scaled(v))
        hidden = hidden + self._through(self.attention_out_norm, self.self_attn.o_proj(mixed.flatten(-2)))
        x = self.middle_norm(hidden)
        gate, up = parts([p(x) for p in self.gate_up()], [shape.ffn, shape.ffn])
        act = glu(gate, up, shape.activation, self.scale)
        out: Tensor = hidden + self._through(self.out_norm, self.mlp.down_proj(act))
        return out

    def _through(self, norm: Norm | None, x: Tensor) -> Tensor:
        return x if norm is None else self.scaled(norm(x))

    def scaled(self, x: Tensor) -> Tensor:
        """``x`` at the scale of the residual stream (`stream_scale`)."""
        return x if self.scale == 1 else x * self.scale

    def scale_(self, x: Tensor) -> Tensor:
        """The same in place."""
        return x if self.scale == 1 else x.mul_(self.scale)

    def heads(self, x: Tensor) -> Tensor:
        """(..., heads * d) -> (..., heads, d)."""
        headed: Tensor = x.unflatten(-1, (-1, self.shape.head_dim))
        return headed

    def qkv(self) -> list[Linear]:
        """The maps of the attention's input: q, k and v, or the one that is all three."""
        return _incoming(self.self_attn, self.self_attn.o_proj)

    def gate_up(self) -> list[Linear]:
        """The maps of the feed-forward block's input: gate and up, or the one that is both."""
        return _incoming(self.mlp, self.mlp.down_proj)

    @property
    def middle_norm(self) -> Norm:
        """The norm before the feed-forward block."""
        return self.pre_feedforward_layernorm if self.shape.sandwich else self.post_attention_layernorm

    @property
    def attention_out_norm(self) -> Norm | None:
        """The norm of the attention block's output, where there is one."""
        return self.post_attention_layernorm if self.shape.sandwich else None

    @property
    def out_norm(self) -> Norm | None:
        """The norm of the feed-forward block's output, where there is one."""
        return self.post_feedforward_layernorm if self.shape.sandwich else None

    def projections(self) -> Iterator[tuple[str, Linear]]:
        """The linear maps with their names in the checkpoint, relative to the layer."""
        for block in ("self_attn", "mlp"):
            for name, module in self.get_submodule(block).named_children():
                if isinstance(module, Linear):
                    yield f"{block}.{name}", module


def parts(outputs: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """What the maps of one input give, one tensor a part: as they are, or the one fused output cut up."""
    return outputs if len(outputs) == len(sizes) else list(outputs[0].split(sizes, dim=-1))


def _incoming(block: nn.Module, last: Linear) -> list[Linear]:
    return [module for module in block.children() if isinstance(module, Linear) and module is not last]
