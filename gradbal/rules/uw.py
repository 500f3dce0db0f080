"""UW: weights from learned noise levels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.rules._base import Claim, Context, LossRule, State
from gradbal.rules._registry import register


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
    :math:`e^{s_i} = L_i`, so that the weight tends to :math:`1 / (2 L_i)`.

    Args:
        init: Start value of every :math:`s_i`.

    Source:
        Kendall, Gal and Cipolla, CVPR 2018, eq. 7, with the factor 1/2 for every kind of task
        as in all public implementations (the paper has 1 for classification).
    """

    learned: ClassVar[tuple[str, ...]] = ("log_variance",)

    start: float

    def __init__(self, *, init: float = 0.0) -> None:  # as a field it would hide the method
        object.__setattr__(self, "start", init)

    def init(self, losses: Tensor) -> State:
        return {"log_variance": torch.full_like(losses, self.start)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        weights = (-ctx.state["log_variance"]).exp() / 2
        ctx.slopes["log_variance"] = 0.5 - weights * losses
        return weights
