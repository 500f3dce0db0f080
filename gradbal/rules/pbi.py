"""PBI: along a ray of preferences, and not off it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._registry import register

TIE = 32  # rounding errors within which the losses lie on the ray


@register(
    "pbi",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Zhang & Li, IEEE TEVC 2007",
    year=2007,
)
@dataclass(frozen=True, kw_only=True)
class PBI(LossRule):
    r"""Penalty-based boundary intersection: minimise :math:`d_1 + \theta d_2`.

    With the unit vector :math:`\hat r` of the preferences and :math:`f = L - z`,
    :math:`d_1 = f^\top \hat r` is the way along the ray and
    :math:`d_2 = \lVert f - d_1 \hat r \rVert` the distance from it. The weights are
    :math:`\hat r + \theta (f - d_1 \hat r) / d_2`; on the ray the second term is 0. They are
    negative for tasks that are too far ahead.

    Args:
        theta: :math:`\theta`, the penalty on leaving the ray; 0 for a weighted sum.
        preferences: The direction of the ray, one number per task, positive; None for equal ones.
        ideal_point: :math:`z`, the best value of each loss; None for 0 each.

    Source:
        Zhang and Li, IEEE TEVC 2007, the boundary intersection with penalty. Nothing is added
        under the root, which would depend on the unit of the losses: on the ray 0 is a subgradient.
    """

    per_task: ClassVar[tuple[str, ...]] = ("preferences", "ideal_point")

    theta: float = 5.0
    preferences: tuple[float, ...] | None = None
    ideal_point: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, 0, theta=self.theta)
        for preference in self.preferences or ():
            checks.positive(self, preferences=preference)
        for value in self.ideal_point or ():
            checks.of_type(self, float, ideal_point=value)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        preferences = ctx.state.get("preferences", torch.ones_like(losses))
        ray = preferences / (preferences @ preferences).sqrt()
        excess = losses - ctx.state.get("ideal_point", 0)
        off = excess - (excess @ ray) * ray
        distance = (off @ off).sqrt()
        rounding = TIE * torch.finfo(losses.dtype).eps * (excess @ excess).sqrt()
        return ray + self.theta * off / distance.where(distance > rounding, torch.inf)
