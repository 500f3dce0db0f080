"""DWA: more weight for the tasks whose losses fall slowly."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale, State
from gradbal.rules._registry import register


@register(
    "dwa",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SUMS_TO_TASKS],
    paper="Liu et al., CVPR 2019",
    year=2019,
)
@dataclass(frozen=True, kw_only=True)
class DWA(LossRule):
    r"""Dynamic weight average: :math:`w = m \operatorname{softmax}(r / T)`.

    :math:`r_i` is the average loss of the last epoch over that of the epoch before. Until two
    epochs have ended every weight is 1.

    Args:
        temperature: :math:`T`; a larger one evens the weights out.
        window: Length of an epoch in steps; with None epochs end where the user calls
            ``mtl_opt.end_epoch()``, and without such calls every weight stays 1.

    Source:
        Liu, Johns and Davison, CVPR 2019, eq. 7.
    """

    scale: ClassVar[Scale] = "sum"

    temperature: float = 2.0
    window: int | None = None

    def __post_init__(self) -> None:
        checks.positive(self, temperature=self.temperature)
        if self.window is not None:
            checks.at_least(self, 1, window=self.window)

    @property
    def by_epochs(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.window is None

    def init(self, losses: Tensor) -> State:
        names = ("total", "count", "newer", "older")
        state = {name: torch.zeros_like(losses) for name in names}
        return state | {"epoch": torch.zeros_like(losses, dtype=torch.int64)}  # each its own

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        state = ctx.state
        if self.window is None:
            self._close(state, ctx.epoch != state["epoch"])
            state["epoch"] = ctx.epoch.expand_as(state["epoch"]).clone()
        older = state["older"]
        known = older != 0
        rates = torch.where(known, state["newer"] / older.where(known, 1), 1.0)
        weights = len(losses) * torch.softmax(rates / self.temperature, dim=0)
        weights = torch.where(known.all(), weights, 1.0)
        state["total"] = state["total"] + losses
        state["count"] = state["count"] + 1
        if self.window is not None:
            self._close(state, state["count"] >= self.window)
        return weights

    def _close(self, state: State, ended: Tensor) -> None:
        """Where an epoch has ended, turn its sum into an average and start the next."""
        ended = ended & (state["count"] > 0)
        mean = state["total"] / state["count"].clamp(min=1)
        state["older"] = torch.where(ended, state["newer"], state["older"])
        state["newer"] = torch.where(ended, mean, state["newer"])
        state["total"] = state["total"].masked_fill(ended, 0)
        state["count"] = state["count"].masked_fill(ended, 0)
