"""IMTL-G: a direction with the same projection on every task gradient."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers.equal_projection import equal_projection


@register(
    "imtl_g",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2021",
    year=2021,
)
@dataclass(frozen=True, kw_only=True)
class IMTLG(GramRule):
    r"""Gradient balance: :math:`g_i^\top d / \lVert g_i \rVert` equal for all tasks.

    With norms :math:`n`, the weights are :math:`G^{-1} n` divided by their sum. For more than
    two tasks that sum may be negative, and every public code then *ascends* all losses; here
    such a point is replaced by the fallback. Tasks with a zero gradient take no part.

    Args:
        fallback: ``"min_norm"``: the min-norm point over the unit gradients, which has the same
            direction wherever that point has only positive weights.

    Source:
        Liu et al., ICLR 2021, eq. 3, in its equivalent Gram form with a pseudo-inverse.
    """

    scale: ClassVar[Scale] = "mean"

    fallback: Literal["min_norm"] = "min_norm"

    def __post_init__(self) -> None:
        checks.one_of(self, ("min_norm",), fallback=self.fallback)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        return equal_projection(gram, eps=ctx.eps, capturable=ctx.capturable)
