"""Logarithms of the losses in place of the losses."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context
from gradbal.rules.transforms.transform import Transform


@dataclass(frozen=True, kw_only=True)
class LogLosses(Transform):
    r"""Let the rule balance :math:`\log L_i`, whose gradients are :math:`g_i / L_i`.

    The same as giving ``MTLOptimizer`` the logarithms, heads included. No task's unit matters any
    more. All losses must be positive.

    Source:
        The scale-invariant baseline of Navon et al., ICML 2022, as a transform for every rule.
    """

    needs_losses = True
    on_heads: ClassVar[bool] = True

    def see(self, ctx: Context) -> Context:
        values = None if ctx.values is None else [math.log(value) for value in ctx.values]
        return replace(ctx, losses=ctx.losses.log(), values=values)

    def sizes(self, norms: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        return ctx.losses

    def keep(self, claims: frozenset[Claim]) -> frozenset[Claim]:
        return claims - {Claim.SIMPLEX, Claim.SUMS_TO_TASKS}
