"""CAGrad: near the mean gradient, as good as possible for the worst task."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers import cagrad_point, cvxpy_cagrad, touches_zero


@register(
    "cagrad",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., NeurIPS 2021",
    year=2021,
)
@dataclass(frozen=True, kw_only=True)
class CAGrad(GramRule):
    r"""Conflict-averse descent.

    Solves :math:`\max_d \min_i g_i^\top d` subject to
    :math:`\lVert d - g_0 \rVert \le c \lVert g_0 \rVert` around the mean gradient :math:`g_0`.
    Where no direction serves all tasks, because the dual's best :math:`J^\top w` is 0,
    :math:`d = 0`.

    Args:
        c: Radius relative to the mean gradient; 0 gives the mean, large values MGDA's direction.
        rescale: What the direction is divided by: ``"c2"`` for :math:`1 + c^2`, ``"c"`` for
            :math:`1 + c`, or None.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Liu et al., NeurIPS 2021, eq. 4 and algorithm 1; division by :math:`1 + c^2` as in the
        authors' code.
    """

    scale: ClassVar[Scale] = "mean"

    c: float = 0.4
    rescale: Literal["c2", "c"] | None = "c2"
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        checks.at_least(self, 0, c=self.c)
        checks.one_of(self, ("c2", "c", None), rescale=self.rescale)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        mean = torch.full_like(gram[0], 1 / len(gram))
        if self.c == 0:
            return mean
        if self.solver == "cvxpy":
            solution = cvxpy_cagrad(gram, self.c)
        else:
            solution = cagrad_point(gram, self.c, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        point = solution.value
        length = (point @ gram @ point).clamp(min=0).sqrt()
        moving = ~touches_zero(gram, point)
        radius = self.c * (mean @ gram @ mean).clamp(min=0).sqrt()
        weights = mean + radius / length.where(moving, 1) * point
        shrink = {"c2": 1 + self.c**2, "c": 1 + self.c, None: 1}[self.rescale]
        return weights.where(moving, 0) / shrink
