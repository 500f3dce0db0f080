"""Auto-Lambda: weights that lower the validation losses a step ahead."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Heads, Rows, State
from gradbal.rules._learned import advance
from gradbal.rules._registry import register
from gradbal.solvers.gram import combined


@register("auto_lambda", claims=[Claim.EQUIVARIANT], paper="Liu et al., TMLR 2022", year=2022)
@dataclass(frozen=True, kw_only=True)
class AutoLambda(GradientRule):
    r"""Weights learned by looking one step of the model ahead.

    With :math:`\theta' = \theta - \eta \sum_i \lambda_i g_i` the weights descend the validation
    losses of the primary tasks there: :math:`\partial / \partial \lambda_i = -\eta\, g_i^\top
    \nabla \sum_j L_j^{val}(\theta')`. Then the model steps with the new weights.

    Call ``step(losses, val)``, where ``val`` is a function that returns the losses of a validation
    batch; or ``step(losses, train, val)`` with a further training batch for the weights.

    Args:
        lr: Learning rate of the weights' Adam.
        init_weight: First value of every weight.
        primary: How much the validation loss of each task counts, one number per task, 0 for an
            auxiliary task; None for 1 each.
        inner_lr: :math:`\eta`; None for the model's learning rate.

    Source:
        Liu, James, Davison and Johns, TMLR 2022, eq. 5 and algorithm 1. The product with the
        Jacobian is exact where the authors take finite differences, and the look ahead is a plain
        gradient step, whatever the base optimizer. As in their code a weight may become negative.
    """

    heads: ClassVar[Heads] = "weighted"
    weighted: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    batches: ClassVar[tuple[int, ...]] = (2, 3)
    per_task: ClassVar[tuple[str, ...]] = ("primary",)
    learned: ClassVar[tuple[str, ...]] = ("weights",)
    learner = "adam"

    lr: float = 1e-4
    init_weight: float = 0.1
    primary: tuple[float, ...] | None = None
    inner_lr: float | None = None

    def __post_init__(self) -> None:
        checks.positive(self, lr=self.lr, init_weight=self.init_weight)
        if self.inner_lr is not None:
            checks.positive(self, inner_lr=self.inner_lr)
        for number in self.primary or ():
            checks.at_least(self, 0, primary=number)

    @property
    def learned_lr(self) -> float:  # type: ignore[override]  # an option under another name
        return self.lr

    def init(self, losses: Tensor) -> State:
        return {"weights": torch.full_like(losses, self.init_weight)}

    def direction(self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context) -> Tensor:
        closure, rows = last_closure(self, ctx), first_rows(grads, ctx)
        lr = ctx.base_lr if self.inner_lr is None else self.inner_lr
        primary = ctx.state.get("primary", torch.ones_like(ctx.losses))
        ahead = combined(ctx.state["weights"], rows)
        _, slopes = ctx.probe(ahead, lr, closure, weights=primary[None])
        products = [
            row.reshape(len(row), -1) @ slope.flatten()
            for row, slope in zip(rows, slopes, strict=True)
        ]
        advance(self, ctx.state, "weights", -lr * ctx.total(products), None, ctx.lr, "adam")
        return ctx.state["weights"]


def last_closure(rule: object, ctx: Context) -> object:
    """Return the last of the further batches, which must be a function.

    Raises:
        TypeError: If it is not.
    """
    if not ctx.more or not callable(ctx.more[-1]):
        raise TypeError(
            f"{type(rule).__name__}: the last batch is looked at from other parameters, so it must "
            "be a function that returns its losses: `step(losses, lambda: losses_of(batch))`."
        )
    return ctx.more[-1]


def first_rows(grads: Sequence[Tensor], ctx: Context) -> Rows:
    """Return the task gradients of the further training batch, or else of the step's."""
    further = ctx.more[0]
    return list(grads) if callable(further) else further
