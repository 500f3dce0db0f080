"""Nash-MTL: weights that are a fair bargain between the tasks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Heads, Weights
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_nash, nash_point


@register(
    "nash_mtl",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.SCALE_FREE],
    paper="Navon et al., ICML 2022",
    year=2022,
)
@dataclass(frozen=True, kw_only=True)
class NashMTL(GramRule):
    r"""Bargaining weights :math:`w > 0` with :math:`G w = 1 / w`, elementwise.

    The direction has length :math:`\sqrt m` whatever the scale of the gradients, and no task is
    harmed. At a Pareto-stationary point there is no solution; then the min-norm weights are
    returned, with which :math:`d = 0`. Tasks with a zero gradient take no part.

    Args:
        max_norm: The shared direction is shortened to at most this norm; None for no limit.
            Heads get the weights as they were before.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Navon et al., ICML 2022, claim 3.1; solved by Newton's method on its convex potential
        instead of a sequence of linearisations.
    """

    heads: ClassVar[Heads] = "weighted"

    max_norm: float | None = 1.0
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        if self.max_norm is not None:
            checks.positive(self, max_norm=self.max_norm)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor | Weights:
        if self.solver == "cvxpy":
            solution = cvxpy_nash(gram)
        else:
            solution = nash_point(gram, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        weights = solution.value
        if self.max_norm is None:
            return weights
        norm = (weights @ gram @ weights).clamp(min=0).sqrt()
        return Weights(weights * (self.max_norm / norm).clamp(max=1), weights)
