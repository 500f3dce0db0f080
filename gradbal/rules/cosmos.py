"""COSMOS: weighted losses that keep the proportions of a preference."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale, State
from gradbal.rules._registry import register


@register(
    "cosmos",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Ruchte & Grabocka, ICDM 2021",
    year=2021,
)
@dataclass(frozen=True, kw_only=True)
class COSMOS(LossRule):
    r"""Conditioned one-shot multi-objective search: minimise :math:`r^\top L - \lambda \cos(r, L)`.

    The weights are :math:`r - \lambda (\hat r - \cos(r, L) \hat L) / \lVert L \rVert` with the
    unit vectors :math:`\hat r` and :math:`\hat L`; they may be negative.

    Args:
        lam: :math:`\lambda`, the weight of the cosine, in the unit of the losses.
        preferences: :math:`r`, one number per task, positive, brought to sum 1 over the present
            tasks; None for equal ones.
        alpha: With a number, preferences are drawn anew for each step from the symmetric Dirichlet
            distribution with this parameter (for the first step they are the given ones). A step
            shows those of the *next* one, so that a network can be fed with them before its
            losses are formed: ``mtl_opt.last.stats["model"]["preference/<task>"]``.

    Source:
        Ruchte and Grabocka, ICDM 2021, their scalarized objective. The draw is kept as gamma
        variates, one per task, so that it has the same law for any set of present tasks.
    """

    scale: ClassVar[Scale] = "mean"
    per_task: ClassVar[tuple[str, ...]] = ("preferences",)

    lam: float = 1.0
    preferences: tuple[float, ...] | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, 0, lam=self.lam)
        for preference in self.preferences or ():
            checks.positive(self, preferences=preference)
        if self.alpha is not None:
            checks.positive(self, alpha=self.alpha)

    def init(self, losses: Tensor) -> State:
        return {} if self.alpha is None else {"preferences": torch.ones_like(losses)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        preferences = ctx.state.get("preferences", torch.ones_like(losses))
        if self.alpha is not None:
            self._draw(self.alpha, losses, ctx)
        preferences = preferences / preferences.sum()
        wanted = preferences / (preferences @ preferences).sqrt()
        length = (losses @ losses).sqrt()
        length = length.where(length > 0, torch.inf)  # without losses the cosine has no slope
        found = losses / length
        return preferences - self.lam * (wanted - (wanted @ found) * found) / length

    def _draw(self, alpha: float, losses: Tensor, ctx: Context) -> None:
        """Draw the preferences of the next step and show them."""
        source = ctx.generator
        shape = torch.full(losses.shape, alpha, dtype=losses.dtype, device=source.device)
        # torch.distributions samples with the same function, but takes no generator
        drawn = torch._standard_gamma(shape, generator=source).to(losses.device)
        ctx.state["preferences"] = drawn
        for name, share in zip(ctx.names, drawn / drawn.sum(), strict=False):
            ctx.stats[f"preference/{name}"] = share
