"""MoCo: weights from gradients that are averaged over steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Scale, State
from gradbal.rules._registry import register
from gradbal.solvers import project_simplex
from gradbal.solvers.gram import combined, times, wide


@register("moco", claims=[Claim.EQUIVARIANT], paper="Fernando et al., ICLR 2023", year=2023)
@dataclass(frozen=True, kw_only=True)
class MoCo(GradientRule):
    r"""Stochastic multi-objective gradient correction.

    Averages :math:`y_i \leftarrow y_i - \beta_t (y_i - g_i)` of the task gradients take the place
    of the gradients, whose noise would bias the weights. These follow a projected gradient step
    towards the min-norm point, :math:`\lambda \leftarrow \Pi_\Delta(\lambda - \gamma_t (y y^\top
    + \rho I) \lambda)`, and the direction is :math:`y^\top \lambda`. The averages start at zero
    and cost as much memory as all task gradients.

    Args:
        beta: Share of the newest gradient at the first step, in (0, 1].
        beta_sigma: :math:`\beta_t = \beta / t^\sigma`, with an exponent of at least 0.
        gamma: Step size of the weights, in units of one over squared gradient norm.
        gamma_sigma: The same exponent for :math:`\gamma_t`.
        rho: Pull towards equal weights, in units of squared gradient norm.
        normalize: Divide each gradient by its norm (``"l2"``) or its loss (``"loss"``) before it
            is averaged, so that one step size fits all; ``"none"`` as in the paper.

    Source:
        Fernando et al., ICLR 2023, algorithm 1. The weights are projected as in the paper; LibMTL
        takes a softmax, which keeps them near uniform, and rescales each gradient to its loss.
    """

    scale: ClassVar[Scale] = "mean"

    beta: float = 0.5
    beta_sigma: float = 0.5
    gamma: float = 0.1
    gamma_sigma: float = 0.5
    rho: float = 0.0
    normalize: Literal["none", "l2", "loss"] = "none"

    def __post_init__(self) -> None:
        checks.positive(self, beta=self.beta)
        checks.between(self, 0, 1, beta=self.beta)
        checks.at_least(
            self,
            0,
            beta_sigma=self.beta_sigma,
            gamma=self.gamma,
            gamma_sigma=self.gamma_sigma,
            rho=self.rho,
        )
        checks.one_of(self, ("none", "l2", "loss"), normalize=self.normalize)

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.normalize == "loss"

    def init(self, losses: Tensor) -> State:
        return {"weights": torch.full_like(losses, 1 / len(losses))}

    def buffers(self, rows: Tensor) -> State:
        return {"average": torch.zeros_like(rows, dtype=wide(rows))}

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> list[Tensor]:
        share = self.beta / (ctx.step + 1) ** self.beta_sigma
        rows = [
            kept["average"] + share * (grad.to(kept["average"].dtype) - kept["average"])
            for kept, grad in zip(ctx.buffers, self._normalized(grads, ctx), strict=True)
        ]
        ctx.buffers = [{"average": row} for row in rows]
        step = self.gamma / (ctx.step + 1) ** self.gamma_sigma
        weights = ctx.state["weights"]
        slope = ctx.gram(rows) @ weights + self.rho * weights
        ctx.state["weights"] = weights = project_simplex(
            weights - step * slope, capturable=ctx.capturable
        )
        ctx.stats["weight"] = weights
        return combined(weights, rows)

    def _normalized(self, grads: Sequence[Tensor], ctx: Context) -> Sequence[Tensor]:
        if self.normalize == "none":
            return grads
        if self.normalize == "loss":
            checks.positive_losses(self, ctx.values, ctx.names)
            sizes = ctx.losses
        else:
            norms = ctx.gram(grads).diagonal().sqrt()
            sizes = norms.where(norms > 0, 1)
        return times(grads, 1 / sizes)
