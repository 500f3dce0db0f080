"""IMTL-L: learned weights that bring all losses to one level."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._log_weights import LearnsLogWeights
from gradbal.rules._registry import register


@register(
    "imtl_l",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2021",
    year=2021,
)
@dataclass(frozen=True, init=False)
class IMTLL(LearnsLogWeights, LossRule):
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

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        return self.learned_weights(losses, ctx)
