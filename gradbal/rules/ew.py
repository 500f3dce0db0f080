"""EW: every task counts the same."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale
from gradbal.rules._registry import register


@register(
    "ew", claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SUMS_TO_TASKS], paper="folklore"
)
@dataclass(frozen=True, kw_only=True)
class EW(LossRule):
    r"""Equal weights: the gradient of :math:`\sum_i L_i`, or of the mean.

    Args:
        reduction: ``"sum"`` (every weight 1) or ``"mean"`` (every weight 1/m).
    """

    needs_losses = False  # only how many there are
    scale: ClassVar[Scale] = "sum"

    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        checks.one_of(self, ("sum", "mean"), reduction=self.reduction)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        value = 1.0 if self.reduction == "sum" else 1.0 / len(losses)
        return torch.full_like(losses, value)
