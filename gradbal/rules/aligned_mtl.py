"""Aligned-MTL: task gradients turned until they are orthogonal and equally long."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers import gram_eigen


@register(
    "aligned_mtl",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Senushkin et al., CVPR 2023",
    year=2023,
)
@dataclass(frozen=True, kw_only=True)
class AlignedMTL(GramRule):
    r"""Alignment of principal components.

    With :math:`G = V \Lambda V^\top` and :math:`B = \sqrt s \, V \Lambda^{-1/2} V^\top` over the
    non-zero eigenvalues, the rows of :math:`B J` are the nearest to those of :math:`J` (up to
    scale) that are orthogonal, each of length :math:`\sqrt s`; their weighted sum is the
    direction. The sum of the gradients where they are orthogonal and equally long already.

    Args:
        scale_mode: :math:`s`: the smallest eigenvalue (``"min"``, stable for all tasks but as
            short as the weakest component), the ``"median"`` (the lower of two), or their mean
            (``"rmse"``). For gradients that are nearly dependent ``"min"`` nearly stops.
        preferences: Weights of the aligned rows, one per task, not negative; None for 1 each.
        tol: Eigenvalues below this part of the largest count as zero, in (0, 1); None for m
            rounding errors of the gradients' dtype.

    Source:
        Senushkin et al., CVPR 2023, algorithm 1, in its Gram form. Departure: eigenvalues are
        counted on the cosines, because on :math:`G` itself a task is dropped for being short.
    """

    scale: ClassVar[Scale] = "sum"
    per_task: ClassVar[tuple[str, ...]] = ("preferences",)

    scale_mode: Literal["min", "median", "rmse"] = "min"
    preferences: tuple[float, ...] | None = None
    tol: float | None = None

    def __post_init__(self) -> None:
        checks.one_of(self, ("min", "median", "rmse"), scale_mode=self.scale_mode)
        for preference in self.preferences or ():
            checks.at_least(self, 0, preferences=preference)
        if self.tol is not None:
            checks.between(self, 0, 1, tol=self.tol)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        tol = len(gram) * ctx.eps if self.tol is None else self.tol
        values, vectors = gram_eigen(gram, tol=tol, capturable=ctx.capturable)
        kept = values > 0
        ratios = self._scale(values, kept) / values.where(kept, 1)
        preferences = ctx.state.get("preferences")
        along = vectors.sum(0) if preferences is None else preferences @ vectors
        return vectors @ (along * ratios.sqrt() * kept)

    def _scale(self, values: Tensor, kept: Tensor) -> Tensor:
        count = kept.sum()
        if self.scale_mode == "rmse":
            return values.sum() / count.clamp(min=1)
        last = count - 1 if self.scale_mode == "min" else count // 2
        return values.sort(descending=True).values.take(last.clamp(min=0))
