"""EPO: towards the Pareto optimal point on a chosen ray."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_simplex_lp, simplex_lp


@register(
    "epo",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Mahapatra & Rajan, ICML 2020",
    year=2020,
)
@dataclass(frozen=True, kw_only=True)
class EPO(GramRule):
    r"""Exact Pareto optimal search: a point where all :math:`r_i L_i` are equal.

    With the shares :math:`s_i = r_i L_i / \sum_j r_j L_j`, the non-uniformity is
    :math:`\mu = \sum_i s_i \log(m s_i)`, and the direction :math:`J^\top a` with
    :math:`a_i = r_i (\log(m s_i) - \mu)` lowers it. The weights solve a linear program over the
    simplex. To balance, while :math:`\mu` is above ``eps``, :math:`w^\top G a` is maximised; the
    tasks with the largest :math:`r_i L_i` must not rise, nor any task that balancing raises rise
    more than by :math:`a` alone; if there is no task that it lowers, none may rise. Then, to
    descend, :math:`\sum_i (G w)_i` is maximised, and no task may rise. Losses must be positive.

    Args:
        preferences: :math:`r`, one per task, positive, so that a larger one asks for a smaller
            loss; None for 1 each.
        eps: Non-uniformity up to which the losses count as balanced.
        relaxed: Let a descent take the losses off the ray again.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Mahapatra and Rajan, ICML 2020. Tasks with a zero gradient take no part. Where no weights
        satisfy all conditions they are in proportion to :math:`r`, as in the authors' training
        code.
    """

    scale: ClassVar[Scale] = "mean"
    per_task: ClassVar[tuple[str, ...]] = ("preferences",)
    needs_losses = True

    preferences: tuple[float, ...] | None = None
    eps: float = 1e-4
    relaxed: bool = False
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        for preference in self.preferences or ():
            checks.positive(self, preferences=preference)
        checks.at_least(self, 0, eps=self.eps)
        checks.one_of(self, (True, False), relaxed=self.relaxed)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        present = gram.diagonal() > 0
        ray = ctx.state.get("preferences", torch.ones_like(ctx.losses)).where(present, 0)
        products = ray * ctx.losses
        shares = products / products.sum()
        ratios = present.sum() * shares
        uneven = torch.special.xlogy(shares, ratios).sum()
        lean = ratios.log() - uneven
        lean = lean.where(present & (lean.abs() > len(gram) * ctx.noise), 0)  # rounding has no sign
        pull = gram @ (ray * lean)

        balance, lowered = uneven > self.eps, pull > 0
        uphill = balance & lowered.any() & (products < products.amax())
        bounds = torch.where(uphill, torch.where(lowered, -torch.inf, pull), 0)
        most = pull.where(present, -torch.inf).amax().clamp(max=0)
        kept = torch.where(balance | self.relaxed, -torch.inf, most)
        solve = cvxpy_simplex_lp if self.solver == "cvxpy" else simplex_lp
        solution = solve(
            torch.where(balance, pull, gram.sum(0)).where(present, -torch.inf),
            torch.cat((gram, pull.unsqueeze(0))),
            torch.cat((bounds, kept.unsqueeze(0))),
            capturable=ctx.capturable,
            tol=1e-9,
        )
        ctx.stats["residual"] = solution.residual
        weights = solution.value
        if ctx.capturable or not solution.converged:
            weights = weights.where(solution.converged | (products.sum() == 0), ray / ray.sum())
        return weights
