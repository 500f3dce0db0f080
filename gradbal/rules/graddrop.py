"""GradDrop: keep one sign per entry, drawn by how much the tasks agree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradbal import checks
from gradbal.registry import register
from gradbal.rule import Claim, Context, GradientRule, Scale


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
        total = grad.sum(dim=0)
        up = grad.clamp(min=0).sum(dim=0)
        down = up - total
        keeps_up = ctx.uniform(index, total) * (up + down) < up
        kept = up.where(keeps_up, -down)
        return kept.lerp(total, self.leak) if self.leak else kept
