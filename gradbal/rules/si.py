"""SI: the logarithms of the losses, so that no unit matters."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._registry import register


@register(
    "si",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Navon et al., ICML 2022",
    year=2022,
)
@dataclass(frozen=True, kw_only=True)
class SI(LossRule):
    r"""Scale-invariant baseline: minimise :math:`\sum_i p_i \log L_i`.

    The weights are :math:`w_i = p_i / L_i`. All losses must be positive.

    Args:
        preferences: Factors :math:`p`, one per task, not negative; None for 1 each.

    Source:
        Navon et al., ICML 2022, the baseline of that name.
    """

    per_task: ClassVar[tuple[str, ...]] = ("preferences",)

    preferences: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for preference in self.preferences or ():
            checks.at_least(self, 0, preferences=preference)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        return ctx.state.get("preferences", 1.0) / losses
