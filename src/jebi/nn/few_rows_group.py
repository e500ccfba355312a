"""The maps of one input for the few rows of decoding: `kernels.few_rows` over what `group.Stacked` has laid together.

Shapes: M rows, K inputs, N outputs of all maps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jebi.kernels import few_rows
from jebi.kernels.glu import Activation
from jebi.kernels.low_rank import LowRank
from jebi.nn.group import Stacked


@dataclass(frozen=True)
class FewRowsGroup:
    """A group and its weights as they are stored, in one piece."""

    group: Stacked
    weight: few_rows.Weight

    def forward(
        self,
        x_MK: Tensor,
        norm: few_rows.NormForm | None = None,
        activation: Activation | None = None,
        scale: float = 1.0,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The maps with all that stands around them, as `few_rows.product` has it; at most `few_rows.MOST` rows.

        ``norm`` is what the rows go through first. Adapters are taken as `Stacked.refresh` left them.
        """
        casts = self.group.casts()
        x, xa_MR = few_rows.normed_and_compressed(x_MK, norm, casts and casts[0])
        thin = LowRank(xa_MR, casts[1].t()) if xa_MR is not None and casts is not None else None
        biases = [linear.bias for linear in self.group.maps if linear.bias is not None]
        bias_N = torch.cat([bias.to(x_MK.dtype) for bias in biases]) if len(biases) > 1 else None
        bias_N = biases[0].to(x_MK.dtype) if len(biases) == 1 else bias_N
        return few_rows.product(x, self.weight, bias_N, thin, activation, scale, residual)


def laid(group: Stacked) -> FewRowsGroup | None:
    """The group with its weights' bytes laid together, where they are of a form that the kernels read."""
    weight = few_rows.stacked(group.stored())
    return FewRowsGroup(group, weight) if weight is not None else None
