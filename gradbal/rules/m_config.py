"""M-ConFIG: ConFIG on averaged gradients, of which one task a step is enough."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, State
from gradbal.rules._registry import register
from gradbal.rules.config import ConFIG
from gradbal.solvers.gram import combined, times, wide


@register("m_config", claims=[Claim.EQUIVARIANT], paper="Liu et al., ICLR 2025", year=2025)
@dataclass(frozen=True, kw_only=True)
class MConFIG(GradientRule):
    r"""Momentum-based conflict-free inverse gradients.

    Averages :math:`m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i` of the gradients of the present
    tasks are kept for all; ConFIG combines their corrected values :math:`m_i / (1 -
    \beta_1^{t_i})` to :math:`\hat d`, absent tasks included. What one gradient would have had to
    be for this, :math:`(\tilde m_t - \beta_1 \tilde m_{t-1}) / (1 - \beta_1)` with
    :math:`\tilde m_t = \hat d (1 - \beta_1^t)`, enters an average :math:`s` of squares, and the
    direction is :math:`\hat d / (\sqrt{s / (1 - \beta_2^t)} + \epsilon)`: Adam's, to be stepped by
    plain SGD. It is zero until every task has been seen.

    A step may hold the loss of one task only and then costs one pass. Which parameters are shared
    is seen over several steps; name them with ``MTLOptimizer(shared=...)`` to have it right from
    the first.

    Args:
        beta1: Share of the past in the averages of gradients, in [0, 1).
        beta2: The same for squares.
        eps: Under the fraction, in units of a gradient entry, as in Adam.

    Source:
        Liu, Chu and Thuerey, ICLR 2025, algorithm 1.
    """

    sees_absent: ClassVar[bool] = True

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            checks.between(self, 0, 1, **{name: getattr(self, name)})
            checks.positive(self, **{f"1 - {name}": 1 - getattr(self, name)})
        checks.at_least(self, 0, eps=self.eps)

    def init(self, losses: Tensor) -> State:
        return {"steps": torch.zeros_like(losses), "calls": losses.new_zeros(())}

    def buffers(self, rows: Tensor) -> State:
        like = rows[0].to(wide(rows))
        return {
            "average": torch.zeros_like(rows, dtype=wide(rows)),
            "direction": torch.zeros_like(like),
            "squares": torch.zeros_like(like),
        }

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> list[Tensor]:
        present, state = ctx.present, ctx.state
        assert present is not None
        state["steps"] = steps = state["steps"].index_add(0, present, torch.ones_like(ctx.losses))
        averages = [
            _with_news(kept["average"], grad, present, self.beta1)
            for kept, grad in zip(ctx.buffers, grads, strict=True)
        ]
        corrected = times(averages, 1 / (1 - self.beta1**steps).where(steps > 0, torch.inf))
        weights = ConFIG().weights(ctx.gram(corrected), ctx)
        found = combined(weights, corrected)
        complete = (steps > 0).all()
        state["calls"] = calls = state["calls"] + complete
        pairs = zip(ctx.buffers, averages, found, strict=True)
        return [self._scaled(kept, average, part, calls, complete) for kept, average, part in pairs]

    def _scaled(
        self, kept: State, average: Tensor, found: Tensor, calls: Tensor, complete: Tensor
    ) -> Tensor:
        """Divide by the root of the averaged squares, and keep the averages."""
        calls, complete = calls.to(found), complete.to(found)
        newest = found * (1 - self.beta1**calls)
        single = (newest - self.beta1 * kept["direction"]) / (1 - self.beta1)
        squares = kept["squares"].lerp(single.square(), 1 - self.beta2)
        kept["average"] = average
        kept["direction"], kept["squares"] = newest * complete, squares * complete
        share = (1 - self.beta2**calls).clamp(min=1 - self.beta2)
        return complete * found / ((squares / share).sqrt() + self.eps).where(found != 0, 1)


def _with_news(average: Tensor, grad: Tensor, present: Tensor, beta: float) -> Tensor:
    """Return the averages, moved on for the present tasks."""
    index = present.to(average.device)
    return average.index_copy(0, index, average[index].lerp(grad.to(average.dtype), 1 - beta))
