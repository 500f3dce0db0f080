"""ExcessMTL: more weight to tasks that are still far from their optimum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Heads, Scale, State
from gradbal.rules._registry import register
from gradbal.solvers.gram import wide

TINY = 2.0**-126  # under the root: the smallest normal number of float32


@register(
    "excess_mtl",
    claims=[Claim.EQUIVARIANT, Claim.SUMS_TO_TASKS],
    paper="He et al., ICML 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class ExcessMTL(GradientRule):
    r"""Robust weights from estimated excess risks.

    With the sum :math:`S_i` of squared gradients so far, entry by entry, :math:`e_i = \sum_p
    g_{ip}^2 / \sqrt{S_{ip}}` estimates how far a task is from its optimum, and the weights follow
    :math:`w_i \leftarrow w_i \exp(\eta e_i / e_i^0)`. The reference :math:`e_i^0` is the estimate
    at the task's first step with a gradient, when the weight stays. The sums cost as much memory
    as all task gradients.

    Args:
        step_size: :math:`\eta`, positive.
        warmup: Steps whose mean is the reference; weights stay meanwhile.
        reduction: Whether the weights sum to the number of tasks (``"sum"``, as in the authors'
            code) or to 1 (``"mean"``, as in the paper).

    Source:
        He et al., ICML 2024, algorithm 1. Without the 1e-7 under the root: an entry without
        gradient counts as zero.
    """

    scale: ClassVar[Scale] = "sum"
    heads: ClassVar[Heads] = "weighted"
    weighted: ClassVar[bool] = True

    step_size: float = 0.01
    warmup: int = 1
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        checks.positive(self, step_size=self.step_size)
        checks.of_type(self, int, warmup=self.warmup)
        checks.at_least(self, 1, warmup=self.warmup)
        checks.one_of(self, ("sum", "mean"), reduction=self.reduction)

    def init(self, losses: Tensor) -> State:
        names = ("log_weights", "steps", "reference", "rate")
        return {name: torch.zeros_like(losses) for name in names}

    def buffers(self, rows: Tensor) -> State:
        return {"squares": torch.zeros_like(rows, dtype=wide(rows))}

    def direction(self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context) -> Tensor:
        excess, state = self._excess(grads, ctx), ctx.state
        moved = state["log_weights"] + excess * state["rate"]
        state["log_weights"] = torch.log_softmax(moved, dim=0)
        if ctx.capturable or min(state["steps"].tolist()) < self.warmup:
            self._learn_reference(excess, state)
        total = 1 if self.reduction == "mean" else excess.shape[0]
        return total * state["log_weights"].exp()

    def _learn_reference(self, excess: Tensor, state: State) -> None:
        """Average the first estimates; weights move once the average stands."""
        steps, reference = state["steps"], state["reference"]
        learning = (steps < self.warmup) & (excess > 0)
        mean = reference + (excess - reference) / (steps + 1)
        state["reference"] = reference = torch.where(learning, mean, reference)
        state["steps"] = steps = steps + learning
        state["rate"] = self.step_size / reference.where(steps >= self.warmup, torch.inf)

    def _excess(self, grads: Sequence[Tensor], ctx: Context) -> Tensor:
        """Return the estimated excess risks, and remember the squares."""
        parts = []
        for kept, grad in zip(ctx.buffers, grads, strict=True):
            squares = grad.to(kept["squares"].dtype).square()
            kept["squares"] = total = kept["squares"] + squares
            risks = total.clamp(min=TINY).rsqrt_().mul_(squares)
            parts.append(risks.reshape(len(risks), -1).sum(dim=1))
        return ctx.total(parts)
