"""FERERO: steepest descent that brings the losses onto a ray."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, State
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_ray_descent, project_simplex, ray_descent

LARGEST = 1e30  # weights up to which single precision holds them and what they multiply


@register(
    "ferero",
    claims=[Claim.EQUIVARIANT],
    paper="Chen et al., NeurIPS 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class FERERO(GramRule):
    r"""Flexible preference-guided descent: losses in proportion to :math:`r`.

    With the cone matrix A, and rows B that span what is orthogonal to :math:`r`, the losses obey
    the preference where :math:`h = B L = 0`. The weights :math:`w = A^\top \lambda + v` solve

    .. math:: \min_{\lambda \in \Delta,\; v \perp r}
              \tfrac12 \|J^\top w\|^2 - c_h \, v^\top L,

    where :math:`v = B^\top \lambda_h`, so that the choice of B plays no part. Then
    :math:`B J d = c_h h`: along the gradient flow :math:`h` decays like :math:`e^{-c_h t}`, for
    which some losses may have to rise. The direction is no sum of gradients in length: a step of
    :math:`1 / c_h` would meet the preference at once if the losses were linear, however small the
    gradients; only weights above 1e30, for single precision, are brought down to that. Tasks with
    a zero gradient take no part.

    Args:
        preferences: :math:`r`, one per task, positive, so that a larger one asks for a larger
            loss; None for 1 each.
        c_h: How fast :math:`h` decays, positive.
        cone: A, a matrix as rows, each with one number per task: progress counts by the smallest
            entry of :math:`A J d`. None for the identity.
        step_size: None solves the program anew in every step. A number is for the single-loop
            form, in which :math:`\lambda` and :math:`v` are kept and every step moves them once
            down their gradient, by this over :math:`\sum_i \|g_i\|^2`; with the identity, less
            than 1 converges.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Chen, Saif, Shen and Chen, NeurIPS 2024. Departures: the program is solved exactly instead
        of by up to 250 projected gradient steps, and the single-loop step is relative to the
        gradients, for the best one has the unit of one over their square.
    """

    per_task: ClassVar[tuple[str, ...]] = ("preferences", "cone_columns")
    needs_losses = True

    preferences: tuple[float, ...] | None = None
    c_h: float = 1.0
    cone: tuple[tuple[float, ...], ...] | None = None
    step_size: float | None = None
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        for preference in self.preferences or ():
            checks.positive(self, preferences=preference)
        checks.positive(self, c_h=self.c_h)
        if self.step_size is not None:
            checks.positive(self, step_size=self.step_size)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)
        if self.cone is not None:
            checks.vectors(self, cone=self.cone)

    @property
    def cone_columns(self) -> list[tuple[float, ...]] | None:
        """For each task its number in every row of the cone matrix: how the state has them."""
        return None if self.cone is None else list(zip(*self.cone, strict=True))

    def init(self, losses: Tensor) -> State:
        if self.step_size is None:
            return {}
        count = len(losses if self.cone is None else self.cone)
        shares = losses.new_full((count,), 1 / count)
        return {"shares": shares, "multipliers": torch.zeros_like(losses)}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        ray = ctx.state.get("preferences", torch.ones_like(ctx.losses))
        excess = self.c_h * ctx.losses
        cone = ctx.state["cone_columns"].T if "cone_columns" in ctx.state else None
        if self.step_size is not None:
            weights = self._move(gram, ray, excess, cone, ctx)
        else:
            solve = cvxpy_ray_descent if self.solver == "cvxpy" else ray_descent
            solution = solve(gram, ray, excess, cone=cone, eps=ctx.eps, capturable=ctx.capturable)
            ctx.stats["residual"] = solution.residual
            weights = solution.value
        return weights / (weights.abs().amax() / LARGEST).clamp(min=1)

    def _move(
        self, gram: Tensor, ray: Tensor, excess: Tensor, cone: Tensor | None, ctx: Context
    ) -> Tensor:
        """Move the multipliers by one projected gradient step and return their weights."""
        shares, multipliers = ctx.state["shares"], ctx.state["multipliers"]
        present = gram.diagonal() > 0
        total = gram.diagonal().sum()
        pace = (self.step_size or 0.0) / total.where(total > 0, 1)
        if cone is None:
            cone = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        slopes = gram @ (shares @ cone + multipliers)
        counted = cone.abs() @ present.to(cone.dtype) > 0
        wanted = (shares - pace * (cone @ slopes)).where(counted, -torch.inf)
        moved = project_simplex(wanted, capturable=ctx.capturable)
        shares = moved.where(counted.any(), shares)
        excess = excess - (excess / ray).amin() * ray  # so that equal losses cancel exactly
        multipliers = (multipliers - pace * (slopes - excess)).where(present, 0)
        ray = ray.where(present, 0)
        along = (ray @ multipliers) / (ray @ ray).where(total > 0, 1)
        multipliers = multipliers - along * ray
        ctx.state.update(shares=shares, multipliers=multipliers)
        return shares @ cone + multipliers
