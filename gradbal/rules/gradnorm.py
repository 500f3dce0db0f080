"""GradNorm: weighted gradient norms that follow the training rates."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale, State
from gradbal.rules._registry import register

SMALLEST = 1e-6  # of a weight that is trained directly
TIE = 32  # rounding errors within which a weighted norm has met its target


@register(
    "gradnorm",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SUMS_TO_TASKS],
    paper="Chen et al., ICML 2018",
    year=2018,
)
@dataclass(frozen=True, kw_only=True)
class GradNorm(GramRule):
    r"""Gradient normalisation.

    With norms :math:`n_i` and relative losses :math:`r_i = (L_i / L_i(0)) / \text{mean}`, the
    weights, which sum to m, are trained on
    :math:`\sum_i | w_i n_i - \overline{w n} \, r_i^\alpha |` with the second term held. The norms
    do not depend on the weights, so the gradient is in closed form and no second derivative is
    ever taken. A step uses the weights from before their update.

    Args:
        alpha: How strongly slow tasks are favoured.
        learned_lr: Learning rate of the weights.
        parametrization: ``"softmax"``: :math:`w = m \operatorname{softmax}(\text{logits})`, always
            positive; ``"direct"``: the weights themselves, renormalised after each update.
        learner: ``"adam"`` or ``"sgd"``.
        initial: Losses :math:`L(0)`, one per task, positive; None for those of each task's first
            step.

    Source:
        Chen et al., ICML 2018, eqs. 1 and 2, on the norms over all shared parameters.
    """

    scale: ClassVar[Scale] = "sum"
    norms_only: ClassVar[bool] = True
    per_task: ClassVar[tuple[str, ...]] = ("initial",)
    needs_losses = True
    learned: ClassVar[tuple[str, ...]] = ("weights",)

    alpha: float = 1.5
    learned_lr: float | None = 0.025
    parametrization: Literal["softmax", "direct"] = "softmax"
    learner: Literal["adam", "sgd"] = "adam"
    initial: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, 0, alpha=self.alpha)
        checks.one_of(self, ("softmax", "direct"), parametrization=self.parametrization)
        checks.one_of(self, ("adam", "sgd"), learner=self.learner)
        if self.learned_lr is not None:
            checks.positive(self, learned_lr=self.learned_lr)
        for loss in self.initial or ():
            checks.positive(self, initial=loss)

    def init(self, losses: Tensor) -> State:
        start = 0.0 if self.parametrization == "softmax" else 1.0
        return {
            "weights": torch.full_like(losses, start),
            "initial": torch.zeros_like(losses),
        }

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        initial = ctx.state["initial"]
        ctx.state["initial"] = initial = initial.where(initial != 0, ctx.losses)
        weights = self._read(ctx.state["weights"])
        if self.parametrization == "direct":
            ctx.state["weights"] = weights
        norms = gram.diagonal().sqrt()
        weighted = weights * norms
        relative = ctx.losses / initial.where(initial != 0, 1)
        rates = relative / relative.mean().where(relative.mean() != 0, 1)
        targets = weighted.mean() * rates.clamp(min=0) ** self.alpha
        gap = weighted - targets
        met = gap.abs() <= TIE * ctx.noise * weighted.amax()  # not the sign of rounding errors
        slope = gap.masked_fill(met, 0).sign() * norms
        if self.parametrization == "softmax":
            slope = weights * (slope - (weights @ slope) / len(weights))
        ctx.slopes["weights"] = slope
        return weights

    def _read(self, stored: Tensor) -> Tensor:
        if self.parametrization == "softmax":
            return len(stored) * torch.softmax(stored, dim=0)
        weights = stored.clamp(min=SMALLEST)
        return weights * (len(weights) / weights.sum())
