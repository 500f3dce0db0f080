"""IMTL: loss balance for the heads, gradient balance for what is shared."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.rules._base import Claim, Context, GramRule, Heads, Weights
from gradbal.rules._log_weights import LearnsLogWeights
from gradbal.rules._registry import register
from gradbal.solvers.equal_projection import equal_projection


@register(
    "imtl",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2021",
    year=2021,
)
@dataclass(frozen=True, init=False)
class IMTL(LearnsLogWeights, GramRule):
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

    def weights(self, gram: Tensor, ctx: Context) -> Weights:
        scales = self.learned_weights(ctx.losses, ctx)
        scaled = gram * torch.outer(scales, scales)
        balanced = equal_projection(scaled, eps=ctx.eps, capturable=ctx.capturable)
        return Weights(balanced * scales, scales)
