"""DualProj: the mean gradient projected so that it harms no task."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_nonnegative_qp, equilibrate, nonnegative_qp, ridged
from gradbal.solvers.gram import ROUNDING


@register(
    "dualproj",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Lopez-Paz & Ranzato, NIPS 2017",
    year=2017,
)
@dataclass(frozen=True, kw_only=True)
class DualProj(GramRule):
    r"""Projection of :math:`J^\top u` onto the dual cone :math:`\{d : J d \ge 0\}`.

    The mean where it conflicts with no task.

    Args:
        preferences: Weights :math:`u`, one per task, not negative; None for 1/m each.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Lopez-Paz and Ranzato, NIPS 2017 (gradient episodic memory), the dual problem, for the mean
        of all tasks; on gradients of unit length, with neither margin nor ridge.
    """

    scale: ClassVar[Scale] = "mean"
    per_task: ClassVar[tuple[str, ...]] = ("preferences",)

    preferences: tuple[float, ...] | None = None
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)
        for preference in self.preferences or ():
            checks.at_least(self, 0, preferences=preference)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        m = gram.shape[0]
        preferences = ctx.state.get("preferences", gram.new_full((m,), 1 / m))
        ctx.stats["residual"] = 0.0
        if self.solver == "exact" and not ctx.capturable:
            slopes = (gram @ preferences).tolist()
            if min(slopes) >= 0:  # the sum harms nobody
                return preferences
            if m == 2:  # one task is harmed, and gets just what it needs
                pairs = zip(preferences.tolist(), slopes, gram.diagonal().tolist(), strict=True)
                return gram.new_tensor([u + max(-s, 0.0) / (g or 1) for u, s, g in pairs])
        cosines, norms = equilibrate(gram)
        parts = preferences * norms
        linear = cosines @ parts
        linear = linear.where(linear.abs() > m * ROUNDING * parts.sum(), 0)  # not rounding alone
        if self.solver == "cvxpy":
            solution = cvxpy_nonnegative_qp(cosines, linear)
        else:
            known = ridged(cosines, ctx.eps)
            solution = nonnegative_qp(known, linear, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        return preferences + solution.value / norms.where(norms > 0, 1)
