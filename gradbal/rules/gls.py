"""GLS: the geometric mean of the losses."""

from dataclasses import dataclass

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._registry import register


@register(
    "gls",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Chennupati et al., CVPR Workshops 2019",
    year=2019,
)
@dataclass(frozen=True, kw_only=True)
class GLS(LossRule):
    r"""Geometric loss strategy: minimise :math:`\ell = (\prod_i L_i)^{1/m}`.

    The weights are :math:`w_i = \ell / (m L_i)`. All losses must be positive.

    Source:
        Chennupati et al., CVPR Workshops 2019, eq. 3; computed through logarithms, so that the
        product neither under- nor overflows.
    """

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        logs = losses.log()
        return (logs.mean() - logs).exp() / len(losses)
