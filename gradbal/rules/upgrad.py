"""UPGrad: every gradient projected so that it harms no task."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_nonnegative_qp, equilibrate, nonnegative_qp, ridged
from gradbal.solvers.active_set import exchange_numbers

FEW = 3  # up to this many tasks plain numbers are faster than tensors
TOL = 1e-10  # largest accepted residual, as of the solver


@register(
    "upgrad",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.LINEAR],
    paper="Quinton & Rey, 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class UPGrad(GramRule):
    r"""Unconflicting projection of gradients.

    Each gradient :math:`u_i g_i` is projected onto the cone of directions that conflict with no
    task, :math:`\{d : J d \ge 0\}`, and the projections are summed. The mean where nothing
    conflicts, and linear in the scale of each gradient.

    Args:
        preferences: Weights :math:`u`, one per task, not negative; None for 1/m each.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Quinton and Rey, arXiv 2406.16232, eq. 6. The gradients are brought to unit length before
        solving. The authors' ridge of 1e-4 on the raw Gram matrix gives up the promise as soon as
        norms differ by about 30 times; the ridge here is as small as the rounding errors of the
        gradients, 1e-9 at most.
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
            least = gram.amin().item()
            if least >= 0:  # nothing conflicts
                return preferences
            if m <= FEW and (found := _few(gram.tolist(), preferences.tolist())) is not None:
                ctx.stats["residual"] = found[1]
                return gram.new_tensor(found[0])
        cosines, norms = equilibrate(gram)
        if self.solver == "cvxpy":
            solution = cvxpy_nonnegative_qp(cosines, cosines)
        else:
            known = ridged(cosines, ctx.eps)
            solution = nonnegative_qp(known, cosines, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        added = (preferences * norms) @ solution.value
        return preferences + added / norms.where(norms > 0, 1)


def _few(gram: list[list[float]], preferences: list[float]) -> tuple[list[float], float] | None:
    """Find the weights and the residual in plain numbers; None where that does not succeed."""
    norms = [math.sqrt(max(row[i], 0.0)) for i, row in enumerate(gram)]
    units = [norm or math.inf for norm in norms]  # a task without gradient: a row of zeros
    cosines = [
        [entry / a / b for entry, b in zip(row, units, strict=True)]
        for row, a in zip(gram, units, strict=True)
    ]
    weights, worst = list(preferences), 0.0
    for row, preference, norm in zip(cosines, preferences, norms, strict=True):
        point, residual, _ = exchange_numbers(cosines, row, TOL)
        if not residual <= TOL:
            return None
        worst = max(worst, residual)
        added = zip(weights, point, units, strict=True)
        weights = [w + preference * norm * max(p, 0.0) / unit for w, p, unit in added]
    return weights, worst
