"""ExcessMTL: more weight to tasks that are still far from their optimum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal import checks
from gradbal.gram import wide
from gradbal.registry import register
from gradbal.rule import Claim, Context, GradientRule, Heads, Scale, State


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
        return {name: torch.zeros_like(losses) for name in ("log_weights", "reference", "steps")}

    def buffers(self, rows: Tensor) -> State:
        return {"squares": torch.zeros_like(rows, dtype=wide(rows))}

    def direction(self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context) -> Tensor:
        excess = self._excess(grads, ctx)
        state, steps = ctx.state, ctx.state["steps"]
        learning = (steps < self.warmup) & (excess > 0)
        total = state["reference"] * steps + excess
        state["reference"] = (total / (steps + 1)).where(learning, state["reference"])
        known = ~learning & (steps > 0)
        ratio = excess / state["reference"].where(known, 1)
        moved = state["log_weights"] + (self.step_size * ratio).where(known, 0)
        state["log_weights"] = moved - moved.amax()
        state["steps"] = steps + learning
        weights = torch.softmax(moved, dim=0)
        return weights if self.reduction == "mean" else len(weights) * weights

    def _excess(self, grads: Sequence[Tensor], ctx: Context) -> Tensor:
        """Return the estimated excess risks, and remember the squares."""
        parts = []
        for kept, grad in zip(ctx.buffers, grads, strict=True):
            squares = grad.to(kept["squares"].dtype).square()
            total = kept["squares"] + squares
            parts.append((squares / total.sqrt().where(total > 0, 1)).flatten(1).sum(dim=1))
            kept["squares"] = total
        return ctx.total(parts)
