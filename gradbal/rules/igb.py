"""IGB: more weight for the tasks whose losses have improved least."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, State
from gradbal.rules._registry import register
from gradbal.rules.stch import average, averages, shares


@register(
    "igb",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Dai et al., UAI 2023",
    year=2023,
)
@dataclass(frozen=True, kw_only=True)
class IGB(LossRule):
    r"""Improvable gap balancing, first version: minimise :math:`\sum_i v_i \log L_i`.

    The factors :math:`v = m \operatorname{softmax}(L / L^b)` are held, so the weights are
    :math:`w_i = v_i / L_i`. The base loss :math:`L_i^b` is a task's average loss in one epoch;
    until it is known, :math:`v_i = 1` and m counts the other tasks. All losses must be positive.

    Args:
        base_epoch: Number of that epoch, from 0.
        window: Length of an epoch in steps, counted for each task; with None epochs end where the
            user calls ``mtl_opt.end_epoch()``, and without such calls every factor stays 1.
        base_losses: :math:`L^b`, one per task; None to measure them.

    Source:
        Dai, Fei and Lu, UAI 2023, IGB v1; the second epoch is that of the authors' code. A task
        that was absent then gets its base loss from the next epoch that it takes part in.
    """

    per_task: ClassVar[tuple[str, ...]] = ("base_losses",)

    base_epoch: int = 1
    window: int | None = None
    base_losses: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        checks.of_type(self, int, base_epoch=self.base_epoch)
        checks.at_least(self, 0, base_epoch=self.base_epoch)
        if self.window is not None:
            checks.at_least(self, 1, window=self.window)
        for loss in self.base_losses or ():
            checks.positive(self, base_losses=loss)

    @property
    def by_epochs(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.window is None and self.base_losses is None

    def init(self, losses: Tensor) -> State:
        return averages("base_losses", losses)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        base = average("base_losses", losses, ctx, self.base_epoch, self.window)
        known = base > 0
        return shares(losses / base.where(known, 1), known) / losses
