"""IMTL: loss balance for the heads, gradient balance for what is shared."""

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Heads, State, Weights
from gradbal.rules._registry import register
from gradbal.rules.imtl_l import learned_scales
from gradbal.rules.uw import LEARNERS, Learner
from gradbal.solvers.equal_projection import equal_projection
from gradbal.solvers.log_weight import log_weight_step


@register(
    "imtl",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2021",
    year=2021,
)
@dataclass(frozen=True, init=False)
class IMTL(GramRule):
    r"""Impartial multi-task learning, IMTL-L and IMTL-G together.

    The scales :math:`e^{s_i}` are learned from the losses as in ``imtl_l``. Heads get the
    gradient of :math:`e^{s_i} L_i`; the shared parameters get the combination of these gradients
    that ``imtl_g`` finds.

    Args:
        init: Start value of every :math:`s_i`, as for ``imtl_l``.
        learner: How they are stepped, as for ``imtl_l``.

    Source:
        Liu et al., ICLR 2021, algorithm 1; ``imtl(init=0.0, learner="base")`` is as published.
    """

    heads: ClassVar[Heads] = "own"
    needs_losses = True
    learned: ClassVar[tuple[str, ...]] = ("log_scale",)

    start: float | None
    learner: Literal["adam", "sgd", "proximal"] | None

    def __init__(self, *, init: float | None = None, learner: Learner = "proximal") -> None:
        checks.one_of(self, LEARNERS, learner=learner)
        object.__setattr__(self, "start", init)  # as a field `init` would hide the method
        object.__setattr__(self, "learner", None if learner == "base" else learner)

    def init(self, losses: Tensor) -> State:
        return {"log_scale": torch.full_like(losses, -inf if self.start is None else self.start)}

    def proximal(self, name: str, value: Tensor, slope: Tensor, lr: float | Tensor) -> Tensor:
        return value + log_weight_step((1 + slope).clamp(min=0), lr)

    def weights(self, gram: Tensor, ctx: Context) -> Weights:
        scales = learned_scales(ctx.losses, ctx)
        ctx.slopes["log_scale"] = scales * ctx.losses - 1
        scaled = gram * torch.outer(scales, scales)
        balanced = equal_projection(scaled, eps=ctx.eps, capturable=ctx.capturable)
        return Weights(balanced * scales, scales)
