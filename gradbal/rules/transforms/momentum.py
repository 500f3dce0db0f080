"""Moving averages of the task gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, State
from gradbal.rules.transforms.transform import Transform
from gradbal.solvers.gram import times, wide


@dataclass(frozen=True, kw_only=True)
class Momentum(Transform):
    r"""Give the rule, and combine, averages of the task gradients over steps.

    :math:`y_i \leftarrow \beta y_i + (1 - \beta) g_i`, divided by :math:`1 - \beta^t` after t
    steps of the task, so that the first average is the first gradient. The average of an absent
    task stands still. Costs as much memory as all task gradients.

    Args:
        beta: Share of the past, in [0, 1).

    Source:
        The tracked gradients of MoCo, Fernando et al., ICLR 2023, with the correction of Adam,
        Kingma and Ba, ICLR 2015.
    """

    tracks: ClassVar[bool] = True

    beta: float = 0.9

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, beta=self.beta)
        checks.positive(self, **{"1 - beta": 1 - self.beta})

    def init(self, losses: Tensor) -> State:
        return {"steps": torch.zeros_like(losses)}

    def buffers(self, rows: Tensor) -> State:
        return {"average": torch.zeros_like(rows, dtype=wide(rows))}

    def track(
        self, rows: Sequence[Tensor], kept: Sequence[State], state: State
    ) -> Sequence[Tensor]:
        state["steps"] = state["steps"] + 1
        for own, row in zip(kept, rows, strict=True):
            average = own["average"]
            own["average"] = average.lerp(row.to(average.dtype), 1 - self.beta)
        averages = [own["average"] for own in kept]
        return times(averages, 1 / (1 - self.beta ** state["steps"]))

    def keep(self, claims: frozenset[Claim]) -> frozenset[Claim]:
        return claims & {Claim.EQUIVARIANT}
