"""GradDrop: keep one sign per entry, drawn by how much the tasks agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers.gram import wide

CHUNK = 2**15  # entries worked on at a time


@register(
    "graddrop",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Chen et al., NeurIPS 2020",
    year=2020,
)
@dataclass(frozen=True, kw_only=True)
class GradDrop(GradientRule):
    r"""Gradient sign dropout.

    In every entry let :math:`p` be the sum of the positive parts over the tasks and :math:`q`
    that of the negative parts. With probability :math:`p / (p + q)` the entry becomes :math:`p`,
    else :math:`-q`: on average the plain sum, and the sum itself where all signs agree.

    Args:
        leak: Share of each gradient that passes undropped, in [0, 1].

    Source:
        Chen et al., NeurIPS 2020, algorithm 1, on parameter gradients, summed over tasks.
    """

    scale: ClassVar[Scale] = "sum"

    leak: float = 0.0

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, leak=self.leak)

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> list[Tensor]:
        return [self._drop(*pair, ctx) for pair in zip(grads, indices, strict=True)]

    def _drop(self, grad: Tensor, index: int, ctx: Context) -> Tensor:
        rows, dtype = grad.reshape(len(grad), -1), wide(grad)
        draws = ctx.uniform(index, rows[0])
        out, ones = torch.empty_like(draws), draws.new_ones(len(rows))
        pieces = (torch.split(part, CHUNK, dim=-1) for part in (rows, draws, out))
        for piece, draw, kept in zip(*pieces, strict=True):  # small enough to stay in the cache
            piece = piece.to(dtype)
            total, up = ones @ piece, ones @ piece.clamp(min=0)
            down = total - up
            keeps_up = (draw * (up - down)).lt_(up)
            torch.lerp(down, up, keeps_up, out=kept)
            if self.leak:
                kept.lerp_(total, self.leak)
        return out.view(grad.shape[1:])
