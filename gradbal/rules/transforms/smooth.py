"""Moving averages of the weights."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, State
from gradbal.rules.transforms.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Smooth(Transform):
    r"""Smooth the weights over steps: :math:`\lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) w_k`.

    The average starts at a task's first weight and stands still while the task is absent. Weights
    that a rule names for the heads alone are left as they are.

    Args:
        alpha: Share of the past, in [0, 1]; 0 leaves every weight as it is.

    Source:
        CR-MOGM, Zhou et al., NeurIPS 2022, with a constant :math:`\alpha`.
    """

    needs_weights: ClassVar[bool] = True

    alpha: float = 0.9

    def __post_init__(self) -> None:
        checks.between(self, 0, 1, alpha=self.alpha)

    def init(self, losses: Tensor) -> State:
        return {
            "average": torch.zeros_like(losses),
            "started": torch.zeros_like(losses, dtype=torch.bool),
        }

    def finish(self, weights: Tensor, state: State) -> Tensor:
        average = state["average"].where(state["started"], weights)
        state["average"] = average = average.lerp(weights, 1 - self.alpha)
        state["started"] = torch.ones_like(state["started"])
        return average.clone()

    def keep(self, claims: frozenset[Claim]) -> frozenset[Claim]:
        return claims - {Claim.NON_CONFLICTING, Claim.SCALE_FREE}
