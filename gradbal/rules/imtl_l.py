"""IMTL-L: learned weights that bring all losses to one level."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, State
from gradbal.rules._registry import register
from gradbal.rules.uw import LEARNERS, Learner
from gradbal.solvers.log_weight import log_weight_step


@register(
    "imtl_l",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2021",
    year=2021,
)
@dataclass(frozen=True, init=False)
class IMTLL(LossRule):
    r"""Loss balance: minimise :math:`\sum_i e^{s_i} L_i - s_i` over model and :math:`s`.

    At the optimum of :math:`s` every scaled loss :math:`e^{s_i} L_i` equals 1. The scales start
    there, at the first loss of each task, and move by proximal steps, which never go beyond it.
    As published they start at 0 and are parameters of the model's optimizer.

    Args:
        init: Start value of every :math:`s_i`; None for minus the logarithm of the first loss.
        learner: ``"proximal"``, or as published ``"adam"`` or ``"sgd"``; ``"base"`` for SGD beside
            an SGD base, else Adam.

    Source:
        Liu et al., ICLR 2021, eq. 6 with base e. Start and proximal step are ours;
        ``imtl_l(init=0.0, learner="base")`` is as published.
    """

    learned: ClassVar[tuple[str, ...]] = ("log_scale",)

    start: float | None
    learner: Literal["adam", "sgd", "proximal"] | None

    def __init__(self, *, init: float | None = None, learner: Learner = "proximal") -> None:
        checks.one_of(self, LEARNERS, learner=learner)
        object.__setattr__(self, "start", init)  # as a field `init` would hide the method
        object.__setattr__(self, "learner", None if learner == "base" else learner)

    def init(self, losses: Tensor) -> State:
        return {"log_scale": torch.full_like(losses, -inf if self.start is None else self.start)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        scales = learned_scales(losses, ctx)
        ctx.slopes["log_scale"] = scales * losses - 1
        return scales

    def proximal(self, name: str, value: Tensor, slope: Tensor, lr: float | Tensor) -> Tensor:
        return value + log_weight_step((1 + slope).clamp(min=0), lr)


def learned_scales(losses: Tensor, ctx: Context) -> Tensor:
    """Return the scales, which begin at the first positive loss of each task."""
    started = ctx.state["log_scale"]
    first = -losses.where(losses > 0, 1).log()
    ctx.state["log_scale"] = scales = torch.where(started == -inf, first, started)
    return scales.exp()
