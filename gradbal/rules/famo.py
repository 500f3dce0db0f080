"""FAMO: equal relative progress for all tasks, from losses alone."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale, State
from gradbal.rules._registry import register

FLOOR = 1e-8  # under the logarithm, as in the authors' code


@register(
    "famo",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Liu et al., NeurIPS 2023",
    year=2023,
)
@dataclass(frozen=True, kw_only=True)
class FAMO(LossRule):
    r"""Fast adaptive multitask optimization.

    With :math:`z = \operatorname{softmax}(\xi)` and losses :math:`D_i` above their lower bounds,
    the weights are :math:`w_i \propto z_i / D_i`, summing to 1. After the step the logits
    :math:`\xi` follow :math:`z \odot (\delta - z^\top \delta)`, where :math:`\delta` is how much
    the logarithm of each loss fell: tasks that gained less get more weight.

    Args:
        lr: Learning rate of the logits' Adam.
        gamma: Decay of the logits, added to their gradient.
        after: Where the losses after the step come from: ``"closure"`` (the same batch again),
            ``"next"`` (the next step's batch: cheaper, noisier), or ``"auto"`` for a closure
            where one is given.
        min_losses: Known lower bounds, one per task; None for zero.

    Source:
        Liu et al., NeurIPS 2023, algorithm 1.
    """

    scale: ClassVar[Scale] = "mean"
    per_task: ClassVar[tuple[str, ...]] = ("min_losses",)
    learned: ClassVar[tuple[str, ...]] = ("logits",)
    learner = "adam"

    lr: float = 0.025
    gamma: float = 1e-3
    after: Literal["auto", "closure", "next"] = "auto"
    min_losses: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.positive(self, lr=self.lr)
        checks.at_least(self, 0, gamma=self.gamma)
        checks.one_of(self, ("auto", "closure", "next"), after=self.after)

    @property
    def learned_lr(self) -> float:  # type: ignore[override]  # an option under another name
        return self.lr

    def init(self, losses: Tensor) -> State:
        return {name: torch.zeros_like(losses) for name in ("logits", "before", "min_losses")}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        ctx.state["before"] = self._log_excess(losses, ctx)
        shares = torch.softmax(ctx.state["logits"], dim=0)
        weights = shares * (-ctx.state["before"]).exp()
        return weights / weights.sum()

    def observe(self, losses: Tensor, ctx: Context) -> None:
        logits = ctx.state["logits"]
        fall = ctx.state["before"] - self._log_excess(losses, ctx)
        shares = torch.softmax(logits, dim=0)
        ctx.slopes["logits"] = shares * (fall - shares @ fall) + self.gamma * logits

    def _log_excess(self, losses: Tensor, ctx: Context) -> Tensor:
        return (losses - ctx.state["min_losses"]).clamp(min=0).add(FLOOR).log()
