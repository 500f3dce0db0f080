"""STCH: a smooth maximum of the losses relative to where they started."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, State
from gradbal.rules._registry import register


@register(
    "stch",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Lin et al., ICML 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class STCH(LossRule):
    r"""Smooth Tchebycheff scalarization: minimise :math:`m \mu \log \sum_i (L_i / N_i)^{1 / \mu}`.

    The weights are :math:`w_i = m p_i / L_i` with
    :math:`p = \operatorname{softmax}(\log(L / N) / \mu)`. A task's nadir :math:`N_i` is its
    average loss in the first epoch after the warm-up; until it is known, the task is left out of
    the sum (and of m) and its :math:`\log L_i` is added instead. All losses must be positive.

    Args:
        mu: :math:`\mu`; a smaller one favours the worst task, a larger one evens out.
        warmup: Epochs before the one whose average is the nadir.
        window: Length of an epoch in steps, counted for each task; with None epochs end where the
            user calls ``mtl_opt.end_epoch()``, and without such calls the warm-up does not end.
        nadir: :math:`N`, one per task; None to measure it.

    Source:
        Lin et al., ICML 2024, in the form of the authors' multi-task code, without its 1e-20 under
        the logarithm, which would depend on the unit of the losses. A task that was absent in the
        epoch after the warm-up gets its nadir from the next epoch that it takes part in.
    """

    per_task: ClassVar[tuple[str, ...]] = ("nadir",)

    mu: float = 1.0
    warmup: int = 4
    window: int | None = None
    nadir: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.positive(self, mu=self.mu)
        checks.of_type(self, int, warmup=self.warmup)
        checks.at_least(self, 0, warmup=self.warmup)
        if self.window is not None:
            checks.at_least(self, 1, window=self.window)
        for loss in self.nadir or ():
            checks.positive(self, nadir=loss)

    @property
    def by_epochs(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.window is None

    def init(self, losses: Tensor) -> State:
        return averages("nadir", losses)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        nadir = average("nadir", losses, ctx, self.warmup, self.window)
        known = nadir > 0
        excess = losses.log() - nadir.where(known, 1).log()
        return shares(excess / self.mu, known) / losses


def averages(name: str, losses: Tensor) -> State:
    """Make the tensors of :func:`average`, every one for each task."""
    state = {key: torch.zeros_like(losses) for key in (name, "total", "count")}
    return state | {"epoch": torch.zeros_like(losses, dtype=torch.int64)}


def average(name: str, losses: Tensor, ctx: Context, epoch: int, window: int | None) -> Tensor:
    """Return each task's average loss in its first epoch from a given one on.

    Every task has an epoch of its own, since the state of absent ones stands still.

    Args:
        name: Where the averages are in ``ctx.state``; nothing that is known changes.
        losses: Positive, shape ``[m]``; counted from the next call on.
        ctx: What else is known.
        epoch: Number of that epoch, from 0.
        window: Length of an epoch in steps, or None where the user marks their ends.

    Returns:
        The averages, shape ``[m]``; 0 where that epoch has not ended.
    """
    state = ctx.state
    known, total, count, current = (state[key] for key in (name, "total", "count", "epoch"))
    now = ctx.epoch.expand_as(current) if window is None else current + (count >= window)
    going_on = now == current
    missing = ~going_on & (current >= epoch) & (known == 0)
    state[name] = known = torch.where(missing, total / count.clamp(min=1), known)
    state["total"] = total.where(going_on, 0) + losses
    state["count"] = count.where(going_on, 0) + 1
    state["epoch"] = now.clone()
    return known


def shares(scores: Tensor, known: Tensor) -> Tensor:
    """Return the softmax over the known tasks times their number, and 1 for the others."""
    among = torch.softmax(scores.where(known, -torch.inf), dim=0)  # not a number if none is known
    return torch.where(known, known.sum() * among, 1.0)
