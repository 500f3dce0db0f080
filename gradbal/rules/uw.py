"""UW: weights from learned noise levels."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, State
from gradbal.rules._registry import register
from gradbal.solvers.log_weight import log_weight_step

Learner = Literal["proximal", "adam", "sgd", "base"]
LEARNERS = get_args(Learner)


@register(
    "uw",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Kendall et al., CVPR 2018",
    year=2018,
)
@dataclass(frozen=True, init=False)
class UW(LossRule):
    r"""Homoscedastic uncertainty: minimise :math:`\sum_i \tfrac12 e^{-s_i} L_i + \tfrac12 s_i`.

    The log variances :math:`s` are learned beside the model; at their optimum
    :math:`e^{s_i} = L_i`, so that the weight tends to :math:`1 / (2 L_i)`. They start there, at the
    first loss of each task, and move by proximal steps, which never go beyond the optimum: losses
    in different units are balanced from the first step on. As published they start at 0 and are
    parameters of the model's optimizer; beside SGD a loss of some thousands then sends its weight
    to zero in one step, for good.

    Args:
        init: Start value of every :math:`s_i`; None for the logarithm of the first loss.
        learner: ``"proximal"``, or as published ``"adam"`` or ``"sgd"``; ``"base"`` for SGD beside
            an SGD base, else Adam.

    Source:
        Kendall, Gal and Cipolla, CVPR 2018, eq. 7, with the factor 1/2 for every kind of task
        as in all public implementations (the paper has 1 for classification). Start and proximal
        step are ours; ``uw(init=0.0, learner="base")`` is as published.
    """

    learned: ClassVar[tuple[str, ...]] = ("log_variance",)

    start: float | None
    learner: Literal["adam", "sgd", "proximal"] | None

    def __init__(self, *, init: float | None = None, learner: Learner = "proximal") -> None:
        checks.one_of(self, LEARNERS, learner=learner)
        object.__setattr__(self, "start", init)  # as a field `init` would hide the method
        object.__setattr__(self, "learner", None if learner == "base" else learner)

    def init(self, losses: Tensor) -> State:
        return {"log_variance": torch.full_like(losses, inf if self.start is None else self.start)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        started = ctx.state["log_variance"]
        first = losses.where(losses > 0, 1).log()  # of a loss that is not positive there is none
        ctx.state["log_variance"] = variance = torch.where(started == inf, first, started)
        weights = (-variance).exp() / 2
        ctx.slopes["log_variance"] = 0.5 - weights * losses
        return weights

    def proximal(self, name: str, value: Tensor, slope: Tensor, lr: float | Tensor) -> Tensor:
        return value - log_weight_step((1 - 2 * slope).clamp(min=0), lr / 2)
