"""ConFIG: the direction with the same cosine to every task gradient."""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule
from gradbal.rules._registry import register
from gradbal.solvers import equilibrate, min_norm, symmetric_eigen
from gradbal.solvers.equal_projection import HARMLESS
from gradbal.solvers.gram import ROUNDING

FLAT = 1e-7  # of what cancels: a Gram matrix cannot tell shorter lengths from zero

Length = Literal["projection", "min", "max", "arithmetic", "geometric", "harmonic"]


@register(
    "config",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Liu et al., ICLR 2025",
    year=2025,
    aliases=("conflict_free",),
)
@dataclass(frozen=True, kw_only=True)
class ConFIG(GramRule):
    r"""Conflict-free inverse gradients.

    With unit gradients :math:`U` and cosines :math:`C = U U^\top` the direction is that of
    :math:`U^\top y`, :math:`C y = p`, whose cosine with task i is proportional to
    :math:`p_i`; where there is none, because the gradients are dependent, the nearest by least
    squares (a pseudo-inverse), and if that harms a task, the one with the largest least cosine.
    The sum of the gradients where all agree. Tasks with a zero gradient take no part.

    Args:
        preferences: :math:`p`, one per task, not negative; None for 1 each.
        length_model: Length of the direction: the sum of the gradients' projections on it
            (``"projection"``), or as if each gradient had the smallest, largest or mean norm of
            all (``"min"``, ``"max"``, ``"arithmetic"``, ``"geometric"``, ``"harmonic"``): that
            norm times the sum of the cosines with the direction.

    Source:
        Liu, Chu and Thuerey, ICLR 2025, with the length models of the authors' package. That no
        task is ever harmed is our addition.
    """

    per_task: ClassVar[tuple[str, ...]] = ("preferences",)

    preferences: tuple[float, ...] | None = None
    length_model: Length = "projection"

    def __post_init__(self) -> None:
        for preference in self.preferences or ():
            checks.at_least(self, 0, preferences=preference)
        checks.one_of(self, get_args(Length), length_model=self.length_model)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        cosines, norms = equilibrate(gram)
        present = norms.sign()
        absent = 1 - present
        shares = self._shares(cosines, present, absent, ctx)
        slopes = cosines @ shares
        square = shares @ slopes
        moving = square > (max(FLAT, ctx.noise) * shares.abs().sum()).square()
        if self.length_model == "projection":
            size = norms @ slopes / square
        else:
            size = self._length(norms, absent) * slopes.sum() / square
        return shares * torch.where(moving, size, 0.0) / (norms + absent)

    def _shares(self, cosines: Tensor, present: Tensor, absent: Tensor, ctx: Context) -> Tensor:
        """Return weights of the unit gradients, of any size."""
        if len(cosines) == 2 and self.preferences is None:
            return present
        target = present if self.preferences is None else present * ctx.state["preferences"]
        values, vectors = symmetric_eigen(cosines, capturable=ctx.capturable)
        kept = values > len(cosines) * ctx.eps * values.amax()
        shares = vectors @ torch.where(kept, target @ vectors / values, 0.0)
        rounding = HARMLESS * len(cosines) * ROUNDING * shares.abs().sum()
        harm = (cosines @ shares).amin() < -rounding
        if ctx.capturable or harm:
            # far away and orthogonal, absent tasks do not change the others' min-norm point
            apart = cosines + (len(cosines) * absent).diag()
            nearest = min_norm(apart, capturable=ctx.capturable).value * present
            shares = torch.where(harm, nearest, shares)
        return shares

    def _length(self, norms: Tensor, absent: Tensor) -> Tensor:
        """Return the smallest, largest or mean norm of the present gradients."""
        if self.length_model == "max":
            return norms.amax()
        if self.length_model == "min":
            return norms.where(norms > 0, torch.inf).amin()
        count = len(norms) - absent.sum()
        if self.length_model == "arithmetic":
            return norms.sum() / count
        if self.length_model == "geometric":
            return ((norms + absent).log().sum() / count).exp()
        return count / ((1 - absent) / (norms + absent)).sum()
