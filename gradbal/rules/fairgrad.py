"""FairGrad: weights that share progress between the tasks alpha-fairly."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_nash, nash_point


@register(
    "fairgrad",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT],
    paper="Ban & Ji, ICML 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class FairGrad(GramRule):
    r"""Weights :math:`w > 0` with :math:`G w = w^{-1/\alpha}`, elementwise.

    They maximise :math:`\sum_i (g_i^\top d)^{1 - \alpha} / (1 - \alpha)` over directions of a
    given length; here :math:`\lVert d \rVert^2 = \sum_i w_i^{1 - 1/\alpha}`, so that for
    :math:`\alpha > 1` smaller gradients make *longer* steps. At a Pareto-stationary point there
    is no solution; then the min-norm weights are returned, with which :math:`d = 0`. Tasks with
    a zero gradient take no part.

    Args:
        alpha: Towards 0 the sum of the gradients, 1 is Nash-MTL, large the worst task alone.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Ban and Ji, ICML 2024, eq. 5; solved by Newton's method instead of least squares from a
        fixed start with absolute tolerances. Default as in the authors' experiments.
    """

    alpha: float = 2.0
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        checks.positive(self, alpha=self.alpha)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        if self.solver == "cvxpy":
            solution = cvxpy_nash(gram, alpha=self.alpha)
        else:
            most = max(40, math.ceil(3 * self.alpha))  # a large power reaches over many decades
            solution = nash_point(gram, alpha=self.alpha, capturable=ctx.capturable, max_iter=most)
        ctx.stats["residual"] = solution.residual
        return solution.value
