"""MOML: weights that lower every task's validation loss a step ahead."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Heads, Scale, State
from gradbal.rules._learned import advance
from gradbal.rules._registry import register
from gradbal.rules.auto_lambda import first_rows, last_closure
from gradbal.solvers.gram import combined
from gradbal.solvers.min_norm import min_norm


@register("moml", claims=[Claim.EQUIVARIANT], paper="Ye et al., NeurIPS 2021", year=2021)
@dataclass(frozen=True, kw_only=True)
class MOML(GradientRule):
    r"""Multi-objective meta learning.

    As Auto-Lambda, but no validation loss is given up for another. With :math:`\lambda =
    \operatorname{softmax}(z)` and :math:`\theta' = \theta - \eta \sum_i \lambda_i g_i`, every task
    has a gradient :math:`h_i = \nabla_z L_i^{val}(\theta')` on the logits; these follow the
    min-norm point of the divided :math:`h_i`. Then the model steps with the new weights.

    Call ``step(losses, val)``, where ``val`` is a function that returns the losses of a validation
    batch; or ``step(losses, train, val)`` with a further training batch for the weights.

    Args:
        lr: Learning rate of the logits' Adam.
        inner_lr: :math:`\eta`; None for the model's learning rate.
        normalize: What each :math:`h_i` is divided by: its norm (``"l2"``), the validation loss
            (``"loss"``) or nothing (``"none"``). With two tasks all of them lie on one line, so
            with ``"l2"`` they agree or cancel.

    Source:
        Ye et al., NeurIPS 2021, algorithm 1, with one inner step, whose derivative is exact.
    """

    scale: ClassVar[Scale] = "mean"
    heads: ClassVar[Heads] = "weighted"
    weighted: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    batches: ClassVar[tuple[int, ...]] = (2, 3)
    learned: ClassVar[tuple[str, ...]] = ("logits",)
    learner = "adam"

    lr: float = 1e-3
    inner_lr: float | None = None
    normalize: Literal["none", "l2", "loss"] = "l2"

    def __post_init__(self) -> None:
        checks.positive(self, lr=self.lr)
        if self.inner_lr is not None:
            checks.positive(self, inner_lr=self.inner_lr)
        checks.one_of(self, ("none", "l2", "loss"), normalize=self.normalize)

    @property
    def learned_lr(self) -> float:  # type: ignore[override]  # an option under another name
        return self.lr

    def init(self, losses: Tensor) -> State:
        return {"logits": torch.zeros_like(losses)}

    def direction(self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context) -> Tensor:
        closure, rows = last_closure(self, ctx), first_rows(grads, ctx)
        lr = ctx.base_lr if self.inner_lr is None else self.inner_lr
        shares = torch.softmax(ctx.state["logits"], dim=0)
        losses, ahead = ctx.probe(combined(shares, rows), lr, closure)
        products = [
            above.reshape(len(above), -1) @ below.reshape(len(below), -1).T
            for above, below in zip(ahead, rows, strict=True)
        ]
        upper = -lr * ctx.total(products) @ (shares.diag() - torch.outer(shares, shares))
        upper = upper / self._sizes(upper, losses.to(upper.device))[:, None]
        chosen = min_norm(upper @ upper.T)
        ctx.stats["residual"] = chosen.residual
        advance(self, ctx.state, "logits", chosen.value @ upper, None, ctx.lr, "adam")
        return torch.softmax(ctx.state["logits"], dim=0)

    def _sizes(self, upper: Tensor, losses: Tensor) -> Tensor:
        if self.normalize == "none":
            return torch.ones_like(losses)
        sizes = losses if self.normalize == "loss" else upper.norm(dim=1)
        return sizes.where(sizes > 0, 1)
