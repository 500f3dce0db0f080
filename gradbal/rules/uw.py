"""UW: weights from learned noise levels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._log_weights import LearnsLogWeights
from gradbal.rules._registry import register


@register(
    "uw",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Kendall et al., CVPR 2018",
    year=2018,
)
@dataclass(frozen=True, init=False)
class UW(LearnsLogWeights, LossRule):
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
    sign: ClassVar[int] = -1
    share: ClassVar[float] = 0.5

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        return self.learned_weights(losses, ctx)
