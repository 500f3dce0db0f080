"""PIVRG: fair progress, with more for the tasks whose metrics fare worst."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, State
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_nash, nash_point

TINY = 1e-300


@register(
    "pivrg",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT],
    paper="Qin et al., CVPR 2025",
    year=2025,
)
@dataclass(frozen=True, kw_only=True)
class PIVRG(GramRule):
    r"""Performance-informed fairness.

    Weights :math:`w > 0` with :math:`G w = \sqrt{\omega / w}`, elementwise, where
    :math:`\omega = m \operatorname{softmax}(\sigma / T)` favours tasks with a large score
    :math:`\sigma`: FairGrad with :math:`\alpha = 2` while all scores are equal. Scores say how
    far a task lags behind, such as the average drop, in per cent, of its training metrics in the
    last epoch against a model of its own. Give new ones after every epoch with
    ``mtl_opt.end_epoch(scores=...)``.

    Args:
        scores: First scores, one per task; None for 0 each.
        bound: Largest ratio of two entries of :math:`\omega`; at least 1.
        min_temperature: :math:`T` is at least this many scores, so that small differences weigh
            little; positive.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Qin, Wang and Yan, CVPR 2025; neither multiplied by the number of tasks nor clipped.
    """

    per_task: ClassVar[tuple[str, ...]] = ("scores",)

    scores: tuple[float, ...] | None = None
    bound: float = 2.0
    min_temperature: float = 10.0
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        for score in self.scores or ():
            checks.of_type(self, float, scores=score)
        checks.at_least(self, 1, bound=self.bound)
        checks.positive(self, min_temperature=self.min_temperature)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)

    def init(self, losses: Tensor) -> State:
        return {"scores": torch.zeros_like(losses)}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        scores = ctx.state["scores"]
        spread = (scores.amax() - scores.amin()).clamp(min=TINY)
        sharpness = (math.log(self.bound) / spread).clamp(max=1 / self.min_temperature)
        demand = len(scores) * torch.softmax(scores * sharpness, dim=0)
        if self.solver == "cvxpy":
            solution = cvxpy_nash(gram, alpha=2.0, demand=demand)
        else:
            solution = nash_point(gram, alpha=2.0, demand=demand, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        return solution.value
