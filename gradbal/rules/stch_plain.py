"""STCH in its plain form: a smooth maximum of the weighted losses."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._registry import register


@register(
    "stch_plain",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Lin et al., ICML 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class STCHPlain(LossRule):
    r"""Smooth Tchebycheff scalarization, a smooth maximum of the weighted losses.

    Minimise :math:`\mu \log \sum_i e^{\lambda_i (L_i - z_i) / \mu}`, which lies between the largest
    :math:`\lambda_i (L_i - z_i)` and :math:`\mu \log m` above it. The weights are
    :math:`w_i = \lambda_i p_i` with :math:`p = \operatorname{softmax}(\lambda (L - z) / \mu)`.

    Args:
        mu: :math:`\mu`, in units of the weighted losses.
        preferences: :math:`\lambda`, one per task, not negative; None for 1/m each.
        ideal_point: :math:`z`, the best value of each loss; None for 0 each.

    Source:
        Lin et al., ICML 2024, the scalarization itself.
    """

    per_task: ClassVar[tuple[str, ...]] = ("preferences", "ideal_point")

    mu: float = 1.0
    preferences: tuple[float, ...] | None = None
    ideal_point: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.positive(self, mu=self.mu)
        for preference in self.preferences or ():
            checks.at_least(self, 0, preferences=preference)
        for value in self.ideal_point or ():
            checks.of_type(self, float, ideal_point=value)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        preferences = ctx.state.get("preferences", 1 / len(losses))
        excess = losses - ctx.state.get("ideal_point", 0)
        return preferences * torch.softmax(preferences * excess / self.mu, dim=0)
