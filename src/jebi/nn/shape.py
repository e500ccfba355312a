"""The sizes and flags of a decoder layer. What computes is `nn.layer`. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jebi.kernels.glu import Activation

LayerKind = Literal["full_attention", "sliding_attention"]
"""transformers' names of the two kinds of layers; each kind may have its own RoPE."""


@dataclass(frozen=True)
class AttentionForm:
    """What a family's attention is beside softmax(q k^T) v."""

    scale: float
    """Factor on the scores; 1 / sqrt(d) in most families."""
    window: int | None = None
    """Tokens that a token sees, itself included (arXiv:2310.06825, section 2); None for all before it."""
    softcap: float | None = None
    """Scores become ``softcap * tanh(scores / softcap)`` (arXiv:2408.00118, section 2)."""


@dataclass(frozen=True)
class MapShape:
    """The sizes of one linear map of a layer."""

    name: str
    """Its name in its block."""
    outputs: int
    """N."""
    inputs: int
    """K."""
    bias: bool
    """Whether it has one."""


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
    attention: AttentionForm
    """Scale, window and cap of the scores."""
    kind: LayerKind = "full_attention"
    """Which of the model's RoPEs turns the queries and keys."""
    activation: "Activation" = "silu"
    """What the gate goes through."""
    qkv_bias: bool = False
    """Whether q, k and v have biases."""
    o_bias: bool = False
    """Whether o has a bias."""
    mlp_bias: bool = False
    """Whether gate, up and down have biases."""
    fused: bool = False
    """Whether q, k and v are one map and gate and up another, as in Phi-3."""
    qk_norm: bool = False
    """Whether every head's queries and keys are normed before they are turned."""
    unit_offset: bool = False
    """Whether norm weights are stored less one."""
    sandwich: bool = False
    """Whether each block's output is normed as well as its input, as in Gemma 2 and 3."""

    @property
    def qkv_sizes(self) -> list[int]:
        """Outputs of q, k and v."""
        inner = self.kv_heads * self.head_dim
        return [self.heads * self.head_dim, inner, inner]

    @property
    def attention_maps(self) -> list[MapShape]:
        """The maps of block ``self_attn``."""
        sizes = dict(zip(("q_proj", "k_proj", "v_proj"), self.qkv_sizes))
        sizes = {"qkv_proj": sum(self.qkv_sizes)} if self.fused else sizes
        maps = [MapShape(name, outputs, self.width, self.qkv_bias) for name, outputs in sizes.items()]
        return [*maps, MapShape("o_proj", self.width, self.heads * self.head_dim, self.o_bias)]

    @property
    def feed_forward_maps(self) -> list[MapShape]:
        """The maps of block ``mlp``."""
        sizes = {"gate_up_proj": 2 * self.ffn} if self.fused else {"gate_proj": self.ffn, "up_proj": self.ffn}
        maps = [MapShape(name, outputs, self.width, self.mlp_bias) for name, outputs in sizes.items()]
        return [*maps, MapShape("down_proj", self.width, self.ffn, self.mlp_bias)]

    def maps(self) -> Iterator[tuple[str, MapShape]]:
        """Every map with its path in the layer."""
        for group in self.groups():
            yield from group

    def groups(self) -> Iterator[list[tuple[str, MapShape]]]:
        """The same, those of one input together."""
        for block, found in (("self_attn", self.attention_maps), ("mlp", self.feed_forward_maps)):
            named = [(f"{block}.{one.name}", one) for one in found]
            yield named[:-1]
            yield named[-1:]
