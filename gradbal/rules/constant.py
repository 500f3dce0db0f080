"""Constant: weights that the user has chosen."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule
from gradbal.rules._registry import register


@register(
    "constant",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SUMS_TO_TASKS],
    paper="folklore",
)
@dataclass(frozen=True, init=False)
class Constant(LossRule):
    r"""Fixed weights: the gradient of :math:`\sum_i w_i L_i`.

    Args:
        weights: :math:`w`, one per task, not negative; None for 1 each. They are used as they
            are, also where tasks are absent.
    """

    needs_losses = False  # only how many there are
    per_task: ClassVar[tuple[str, ...]] = ("weight",)

    weight: tuple[float, ...] | None

    def __init__(self, *, weights: Iterable[float] | None = None) -> None:
        given = None if weights is None else tuple(weights)  # as a field it would hide the method
        object.__setattr__(self, "weight", given)
        for weight in given or ():
            checks.at_least(self, 0, weights=weight)

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        given = ctx.state.get("weight")
        return torch.ones_like(losses) if given is None else given.clone()
