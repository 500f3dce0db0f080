"""GradVac: each gradient is turned towards the others up to a learned similarity."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale, State
from gradbal.rules._registry import register
from gradbal.rules.pcgrad import visits

PARALLEL = 1e-8  # 1 - target^2 below which a target cannot be aimed at any more


@register("gradvac", claims=[Claim.HOMOGENEOUS], paper="Wang et al., ICLR 2021", year=2021)
@dataclass(frozen=True, kw_only=True)
class GradVac(GramRule):
    r"""Gradient vaccine.

    As PCGrad, but a visited gradient is corrected whenever the cosine is below its target, and so
    that it then equals the target. Targets are moving averages of the cosines found, over every
    visited pair. Use ``groups="tensor"`` for one target per parameter tensor.

    Args:
        beta: Share of the newest cosine in the average, in [0, 1].
        target: Start value of every target, in (-1, 1).
        order: In which order the others are visited, as in PCGrad.

    Source:
        Wang et al., ICLR 2021, algorithm 1 and eq. 3; pairs with a zero gradient are left out,
        and so are targets too close to 1 to be aimed at.
    """

    scale: ClassVar[Scale] = "sum"

    beta: float = 0.5
    target: float = 0.0
    order: Literal["random", "given"] = "random"

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, beta=self.beta)
        checks.between(self, -1, 1, target=self.target)
        checks.one_of(self, ("random", "given"), order=self.order)

    def init(self, losses: Tensor) -> State:
        return {"target": losses.new_full((len(losses), len(losses)), self.target)}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        m = len(gram)
        coefficients = torch.eye(m, dtype=gram.dtype, device=gram.device)
        norms = gram.diagonal().sqrt()
        for others in visits(m, self.order, ctx, gram.device):
            column = others[:, None]
            target = ctx.state["target"].gather(1, column)[:, 0]
            product = (coefficients * gram[others]).sum(dim=1)
            length = (coefficients @ gram * coefficients).sum(dim=1).clamp(min=0).sqrt()
            scale = length * norms[others]
            met = scale > 0
            cosine = (product / scale.where(met, 1)).clamp(-1, 1)
            free = 1 - target.square()
            turn = target * (1 - cosine.square()).sqrt() - cosine * free.clamp(min=0).sqrt()
            reach = norms[others] * free.clamp(min=PARALLEL).sqrt()
            amount = length * turn / reach.where(met, 1)
            amount = amount.where(met & (cosine < target) & (free > PARALLEL), 0)
            coefficients = coefficients.scatter_add(1, column, amount[:, None])
            moved = torch.where(met, target + self.beta * (cosine - target), target)
            ctx.state["target"] = ctx.state["target"].scatter(1, column, moved[:, None])
        return coefficients.sum(dim=0)
