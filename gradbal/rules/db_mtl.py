"""DB-MTL: logarithms of the losses, and gradients of equal length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, Direction, GradientRule, Heads, State, Weights
from gradbal.rules._registry import register
from gradbal.solvers.gram import combined, times, wide


@register("db_mtl", claims=[Claim.EQUIVARIANT], paper="Lin et al., 2023", year=2023)
@dataclass(frozen=True, kw_only=True)
class DBMTL(GradientRule):
    r"""Dual balancing of losses and gradients.

    The gradients :math:`h_i = \nabla \log L_i = g_i / L_i` are averaged over steps, :math:`b_i
    \leftarrow h_i + \beta_t (b_i - h_i)`, and brought to the length of the longest average:
    :math:`d = \sum_i a_i b_i` with :math:`a_i = \max_k \lVert b_k \rVert / \lVert b_i \rVert`.
    Heads get the gradient of :math:`\log L_i`. No unit of a loss matters. The averages start at
    zero and cost as much memory as all task gradients; with ``beta=0`` there are none, and the
    direction is a weighted sum of the task gradients.

    Args:
        beta: Share of the past at the first step, in [0, 1).
        beta_sigma: :math:`\beta_t = \beta / t^\sigma`, with an exponent of at least 0.

    Source:
        Lin et al., arXiv 2308.12029, algorithm 1; without the authors' 1e-8 beside losses and
        norms, which would be a unit. A task without gradient has no part.
    """

    heads: ClassVar[Heads] = "own"
    needs_losses = True

    beta: float = 0.9
    beta_sigma: float = 0.0

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, beta=self.beta)
        checks.at_least(self, 0, beta_sigma=self.beta_sigma)

    @property
    def weighted(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.beta == 0

    def buffers(self, rows: Tensor) -> State:
        return {} if self.weighted else {"average": torch.zeros_like(rows, dtype=wide(rows))}

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> Direction | Weights:
        checks.positive_losses(self, ctx.values, ctx.names)
        inverse = 1 / ctx.losses
        if self.weighted:
            norms = ctx.gram(grads).diagonal().sqrt() * inverse
            return Weights(self._factors(norms) * inverse, inverse)
        past = self.beta / (ctx.step + 1) ** self.beta_sigma
        rows = [
            row + past * (kept["average"] - row)
            for kept, row in zip(ctx.buffers, times(grads, inverse), strict=True)
        ]
        ctx.buffers = [{"average": row} for row in rows]
        factors = self._factors(ctx.gram(rows).diagonal().sqrt())
        return Direction(combined(factors, rows), inverse)

    def _factors(self, norms: Tensor) -> Tensor:
        """Return what brings every gradient to the length of the longest."""
        return norms.amax() / norms.where(norms > 0, torch.inf)
