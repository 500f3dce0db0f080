"""IMTL-L: learned weights that bring all losses to one level."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.rules._base import Claim, Context, LossRule, State
from gradbal.rules._registry import register


@register(
    "imtl_l",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2021",
    year=2021,
)
@dataclass(frozen=True, kw_only=True)
class IMTLL(LossRule):
    r"""Loss balance: minimise :math:`\sum_i e^{s_i} L_i - s_i` over model and :math:`s`.

    At the optimum of :math:`s` every scaled loss :math:`e^{s_i} L_i` equals 1.

    Source:
        Liu et al., ICLR 2021, eq. 6 with base e.
    """

    learned: ClassVar[tuple[str, ...]] = ("log_scale",)

    def init(self, losses: Tensor) -> State:
        return {"log_scale": torch.zeros_like(losses)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        weights = ctx.state["log_scale"].exp()
        ctx.slopes["log_scale"] = weights * losses - 1
        return weights
