"""PMTL: down to the Pareto front within one of several sectors."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale, State
from gradbal.rules._registry import register
from gradbal.solvers import combined_min_norm, cvxpy_min_norm


@register(
    "pmtl",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Lin et al., NeurIPS 2019",
    year=2019,
)
@dataclass(frozen=True, kw_only=True)
class PMTL(GramRule):
    r"""Pareto multi-task learning in the sector of one of several preference vectors.

    The sector of the unit vector :math:`u_p` holds the losses that lie nearer to it than to any
    other :math:`u_k`, where :math:`a_k = (u_k - u_p)^\top L \le 0`. The direction is the shortest
    vector in the hull of the task gradients and of the gradients of those :math:`a_k` that are
    positive; it lowers all of these. The weights of the tasks sum them up and may be negative.
    Tasks with a zero gradient take no part.

    Args:
        preferences: The vectors :math:`u_1, \dots, u_P`, each with one number per task, not
            negative, of any length; None for the coordinate axes and, last, equal numbers.
        index: Which of them is this run's own, counted from 0, or from the end if negative.
        initial_steps: For at most so many steps the task gradients are left out until the losses
            lie in the sector; for example a fifth of all steps.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Lin et al., NeurIPS 2019; their code has two tasks, this is the same for any number.
    """

    scale: ClassVar[Scale] = "mean"
    per_task: ClassVar[tuple[str, ...]] = ("preference_columns",)
    needs_losses = True

    preferences: tuple[tuple[float, ...], ...] | None = None
    index: int = -1
    initial_steps: int = 0
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        checks.of_type(self, int, index=self.index, initial_steps=self.initial_steps)
        checks.at_least(self, 0, initial_steps=self.initial_steps)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)
        if self.preferences is None:
            return
        checks.vectors(self, preferences=self.preferences)
        for vector in self.preferences:
            checks.positive(self, preferences=max(vector))
            for number in vector:
                checks.at_least(self, 0, preferences=number)
        checks.between(self, -len(self.preferences), len(self.preferences) - 1, index=self.index)

    @property
    def preference_columns(self) -> list[tuple[float, ...]] | None:
        """For each task its number in every preference: how the state has them."""
        return None if self.preferences is None else list(zip(*self.preferences, strict=True))

    def init(self, losses: Tensor) -> State:
        if self.initial_steps == 0:
            return {}
        return {"elapsed": torch.zeros((), dtype=torch.int64, device=losses.device)}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        present = gram.diagonal() > 0
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        vectors = ctx.state.get("preference_columns")
        if vectors is None:
            vectors = torch.cat((eye, torch.ones_like(eye[:, :1])), dim=1)
            checks.between(self, -len(gram) - 1, len(gram), index=self.index)
        vectors = vectors * present.unsqueeze(-1)
        lengths = vectors.norm(dim=0)
        vectors = vectors / lengths.where(lengths > 0, 1)
        sides = vectors.T - vectors[:, self.index]
        active = sides @ ctx.losses > 0
        if self.initial_steps > 0:
            elapsed = ctx.state["elapsed"]
            early = (elapsed < self.initial_steps) & active.any()
            ctx.state["elapsed"] = torch.where(early, elapsed + 1, self.initial_steps)
            present = present & ~early
        part = torch.cat((present, active))
        if self.solver == "cvxpy" and part.any():
            rows = torch.cat((eye, sides))[part]
            solution = cvxpy_min_norm(rows @ gram @ rows.T)
            solution = solution._replace(value=solution.value @ rows)
        else:
            solution = combined_min_norm(gram, sides, part, eps=ctx.eps, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        return solution.value
