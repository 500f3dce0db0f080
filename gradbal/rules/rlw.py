"""RLW: random weights, drawn anew in every step."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.rules._base import Claim, Context, LossRule, Scale
from gradbal.rules._registry import register


@register(
    "rlw", claims=[Claim.HOMOGENEOUS, Claim.SIMPLEX], paper="Lin et al., TMLR 2022", year=2022
)
@dataclass(frozen=True, kw_only=True)
class RLW(LossRule):
    r"""Random loss weighting: :math:`w = \operatorname{softmax}(z)`, :math:`z \sim N(0, I)`.

    Source:
        Lin et al., TMLR 2022, section 3, with the normal law that their experiments use.
    """

    needs_losses = False  # only how many there are
    scale: ClassVar[Scale] = "mean"

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        source = ctx.generator
        draw = torch.randn(len(losses), generator=source, dtype=losses.dtype, device=source.device)
        return torch.softmax(draw.to(losses.device), dim=0)
