"""PCD: the first task's gradient, turned as little as lets the other tasks improve."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Context, GramRule, State
from gradbal.rules._registry import register
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.nonnegative_qp import nonnegative_qp

AHEAD = 1e-7  # cosine with the first gradient below which a direction has left it


@register("pcd", paper="TMLR 2026, arXiv 2606.29521", year=2026)
@dataclass(frozen=True, kw_only=True)
class PCD(GramRule):
    r"""Priority-constrained descent; the first of the present tasks comes first.

    With gradients :math:`\tilde g` over the root of their average squared norm, it solves

    .. math:: \min_d \tfrac12 \lVert d - \tilde g_1 \rVert^2 \quad \text{subject to} \quad
              \tilde g_j^\top d \ge \tau_j \lVert \tilde g_j \rVert^2, \quad j \ge 2,

    and brings :math:`d` to the length of :math:`g_1`. Tasks with a zero gradient take no part.
    The direction is :math:`g_1` itself where no :math:`d` satisfies all of them.

    Args:
        tau: How much of its own descent every other task is to make, in [0, 1].
        taus: The same, one per task, the first of which is not used; None for ``tau`` each.
        beta: Share of the past in the averages of squared norms, in [0, 1]; 1 for plain averages.

    Source:
        arXiv 2606.29521 (TMLR 2026). Departures: no constant is added under the root, so that
        small gradients are scaled as large ones; and a :math:`d` that would not make the first
        task improve, which the authors' code returns at full length, is replaced by :math:`g_1`.
    """

    per_task: ClassVar[tuple[str, ...]] = ("taus",)

    tau: float = 0.02
    taus: tuple[float, ...] | None = None
    beta: float = 0.999

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, tau=self.tau, beta=self.beta)
        for tau in self.taus or ():
            checks.between(self, 0, 1, taus=tau)

    def init(self, losses: Tensor) -> State:
        return {name: torch.zeros_like(losses) for name in ("squares", "steps")}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        cosines, norms = equilibrate(gram)
        absent = 1 - norms.sign()
        sizes = norms / (self._average(gram.diagonal(), ctx.state).sqrt() + absent)
        if len(norms) == 1:
            return torch.ones_like(norms)
        taus = ctx.state["taus"][1:] if self.taus else self.tau
        linear = cosines[1:, 0] * sizes[0] - taus * sizes[1:]
        solution = nonnegative_qp(cosines[1:, 1:], linear, capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        parts = torch.cat((sizes[:1], solution.value))
        slopes = cosines @ parts
        length = (parts @ slopes).sqrt()
        ahead = solution.converged & (slopes[0] > AHEAD * length) & (length > AHEAD * parts.sum())
        weights = parts * (norms[0] / length) / (norms + absent)
        if ctx.capturable or not ahead:
            first = torch.eye(1, len(norms), dtype=norms.dtype, device=norms.device)[0]
            weights = torch.where(ahead, weights, first)
        return weights

    def _average(self, squares: Tensor, state: State) -> Tensor:
        """Return the average of the squared norms since each task's first step, now included."""
        state["steps"] = state["steps"] + 1
        if self.beta < 1:
            share = (1 - self.beta) / (1 - self.beta ** state["steps"])
        else:
            share = 1 / state["steps"]
        state["squares"] = torch.lerp(state["squares"], squares, share)
        return state["squares"]
