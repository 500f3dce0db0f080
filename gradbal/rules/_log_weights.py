"""Base of rules that learn the logarithm of a weight for each loss."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Context, Rule, State
from gradbal.solvers.log_weight import log_weight_step

Learner = Literal["proximal", "adam", "sgd", "base"]


@dataclass(frozen=True, init=False)
class LearnsLogWeights(Rule):
    r"""Minimises :math:`c \sum_i w_i L_i - \log w_i` over the model and :math:`s_i = \pm \log w_i`.

    The optimum of a weight is :math:`1 / L_i`. By default each starts there, at the first positive
    loss of its task, and moves by proximal steps, which never go beyond it.

    Attributes:
        sign: Of the logarithm in what is learned.
        share: :math:`c`.
        start: Start value of every :math:`s_i`; None for the first loss.
        learner: As for :class:`gradbal.rules._base.Rule`.
    """

    sign: ClassVar[int] = 1
    share: ClassVar[float] = 1.0

    start: float | None
    learner: Literal["adam", "sgd", "proximal"] | None

    def __init__(self, *, init: float | None = None, learner: Learner = "proximal") -> None:
        checks.one_of(self, get_args(Learner), learner=learner)
        object.__setattr__(self, "start", init)  # as a field `init` would hide the method
        object.__setattr__(self, "learner", None if learner == "base" else learner)

    def init(self, losses: Tensor) -> State:
        (name,) = self.learned
        start = -self.sign * inf if self.start is None else self.start
        return {name: torch.full_like(losses, start)}

    def learned_weights(self, losses: Tensor, ctx: Context) -> Tensor:
        """Return :math:`c w_i`, shape ``[m]``, and leave the gradient of what is learned."""
        (name,) = self.learned
        kept = ctx.state[name]
        first = -self.sign * losses.where(losses > 0, 1).log()
        ctx.state[name] = value = torch.where(kept == -self.sign * inf, first, kept)
        weights = self.share * (self.sign * value).exp()
        ctx.slopes[name] = self.sign * (weights * losses - self.share)
        return weights

    def proximal(self, name: str, value: Tensor, slope: Tensor, lr: float | Tensor) -> Tensor:
        scaled = (1 + self.sign * slope / self.share).clamp(min=0)  # loss times weight
        return value + self.sign * log_weight_step(scaled, self.share * lr)
