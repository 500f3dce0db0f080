"""Trimmed mean: in every entry the mean without the largest and smallest values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Scale
from gradbal.rules._registry import register

Pick = Callable[[Tensor, Tensor], Tensor]  # of two values in every entry
SHORT = 256  # entries, per value trimmed, up to which sorting beats comparing rows in pairs


@register(
    "trimmed_mean",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Yin et al., ICML 2018",
    year=2018,
)
@dataclass(frozen=True, kw_only=True)
class TrimmedMean(GradientRule):
    r"""Coordinate-wise trimmed mean: up to :math:`b` gradients may be anything in each entry.

    Args:
        n_trimmed: :math:`b`, how many of the largest values and how many of the smallest are left
            out in every entry; there must be more than :math:`2 b` tasks, and with one more it is
            the median. None for one of each, or none as long as there are but two tasks.

    Source:
        Yin et al., ICML 2018, definition 2, with a number of values in place of a share.
    """

    scale: ClassVar[Scale] = "mean"

    n_trimmed: int | None = None

    def __post_init__(self) -> None:
        if self.n_trimmed is not None:
            checks.of_type(self, int, n_trimmed=self.n_trimmed)
            checks.at_least(self, 0, n_trimmed=self.n_trimmed)

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> list[Tensor]:
        m = len(ctx.losses)
        trimmed = int(m > 2) if self.n_trimmed is None else self.n_trimmed
        if 2 * trimmed >= m:
            raise ValueError(
                "TrimmedMean: `n_trimmed` must be less than half the number of tasks, got "
                f"{trimmed} with {m} tasks."
            )
        return [_trimmed_mean(grad, trimmed) for grad in grads]


def _trimmed_mean(grad: Tensor, trimmed: int) -> Tensor:
    if grad[0].numel() < SHORT * trimmed:
        rows = list(grad.sort(dim=0).values[trimmed : len(grad) - trimmed])
    else:
        rows = list(grad)
        for _ in range(trimmed):
            _drop(rows, torch.minimum, torch.maximum)
            _drop(rows, torch.maximum, torch.minimum)
    total: Tensor = rows[0].to(torch.promote_types(grad.dtype, torch.float32))
    for row in rows[1:]:
        total = total + row
    return total.div(len(rows)).to(grad.dtype)


def _drop(rows: list[Tensor], inner: Pick, outer: Pick) -> None:
    """Carry the outermost value of every entry through the rows, and leave it out."""
    carried = rows[0]
    for i in range(1, len(rows)):
        row = rows[i]
        rows[i - 1] = inner(carried, row)
        if i < len(rows) - 1:
            carried = outer(carried, row)
    rows.pop()
