"""EDM: the shortest vector in the convex hull of the directions of the task gradients."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.gram import ROUNDING
from gradbal.solvers.nonnegative_qp import nonnegative_qp

ALIKE = 8  # rounding errors of a cosine within which two gradients are parallel


@register(
    "edm",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Katrutsa et al., 2020",
    year=2020,
)
@dataclass(frozen=True, kw_only=True)
class EDM(GramRule):
    r"""Equiangular direction method ("follow the bisector").

    With the min-norm point :math:`z` over the unit gradients the weights are
    :math:`w_i \propto z_i / \lVert g_i \rVert`, summing to 1. The direction makes the same angle
    with every gradient that has weight and a smaller one with the others: that of IMTL-G
    wherever all have weight, and never uphill. Tasks with a zero gradient take no part.

    Source:
        Katrutsa et al., arXiv 2007.06937; in public code one zero gradient stops all tasks.
    """

    scale: ClassVar[Scale] = "mean"

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        if len(gram) == 2 and not ctx.capturable:
            first, second = (max(square, 0.0) ** 0.5 for square in gram.diagonal().tolist())
            if first > 0 and second > 0:
                return gram.new_tensor([second / (first + second), first / (first + second)])
        cosines, norms = equilibrate(gram)
        present = norms.sign()
        # the shortest vector: the sum of the weights is left free, and pulled towards 1
        solution = nonnegative_qp(
            torch.addr(cosines, present, present), -present, capturable=ctx.capturable
        )
        ctx.stats["residual"] = solution.residual
        alike = (cosines - (1 - ALIKE * ROUNDING)).clamp(min=0).sign()
        shares = alike @ (solution.value / alike.sum(dim=1).clamp(min=1))  # of parallel ones even
        weights = shares / (norms + (1 - present))
        return (weights / weights.sum()).nan_to_num(nan=1 / len(gram))  # all without gradient
