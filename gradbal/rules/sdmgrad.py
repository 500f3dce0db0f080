"""SDMGrad: the min-norm point, drawn towards a direction that the user prefers."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale, State
from gradbal.rules._registry import register
from gradbal.rules.modo import independent
from gradbal.solvers import min_norm, project_simplex


@register(
    "sdmgrad",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Xiao et al., NeurIPS 2023",
    year=2023,
)
@dataclass(frozen=True, kw_only=True)
class SDMGrad(GramRule):
    r"""Stochastic direction-oriented multi-objective gradient.

    :math:`\min_{w \in \Delta} \tfrac12 \lVert J^\top (w + \lambda \tilde w) \rVert^2` for a target
    :math:`\tilde w`; the direction is :math:`J^\top (w + \lambda \tilde w) / (1 + \lambda)`. MGDA
    at :math:`\lambda = 0`, the target's gradient for large ones.

    With one batch the minimum is found exactly. With ``step(losses, second)`` or ``step(losses,
    second, third)`` the last two batches, which must be independent, estimate its gradient
    :math:`J_1 J_2^\top (w + \lambda \tilde w)` without bias, and the weights, kept from step to
    step, follow it by projected descent with momentum.

    Args:
        lam: Pull :math:`\lambda` towards the target, at least 0.
        preferences: The target :math:`\tilde w`, one number per task, not negative; it is scaled
            to sum 1. None for equal ones.
        n_iter: Descent steps.
        momentum: Of the descent, in [0, 1).
        lr: Its step size, with inner products divided by the squared mean gradient norm; the
            authors' 10 does not converge. None for a safe one; a number has one batch treated
            like several.

    Source:
        Xiao, Ban and Ji, NeurIPS 2023, algorithm 1 and, for one batch, eq. 4. In the authors'
        code the batches are one and the same.
    """

    scale: ClassVar[Scale] = "mean"
    batches: ClassVar[tuple[int, ...]] = (1, 2, 3)
    per_task: ClassVar[tuple[str, ...]] = ("preferences",)

    lam: float = 0.3
    preferences: tuple[float, ...] | None = None
    n_iter: int = 20
    momentum: float = 0.5
    lr: float | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, 0, lam=self.lam)
        checks.of_type(self, int, n_iter=self.n_iter)
        checks.at_least(self, 1, n_iter=self.n_iter)
        checks.between(self, 0, 1, momentum=self.momentum)
        if self.lr is not None:
            checks.positive(self, lr=self.lr)
        for preference in self.preferences or ():
            checks.at_least(self, 0, preferences=preference)

    def init(self, losses: Tensor) -> State:
        return {"weights": torch.full_like(losses, 1 / len(losses))}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        target = ctx.state.get("preferences", torch.ones_like(ctx.losses))
        target = target / target.sum()
        if ctx.cross is None and self.lr is None:
            # on the simplex w + lam target = M w, so this is a min-norm point of moved gradients
            moved = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            moved = moved + self.lam * target[:, None]
            solution = min_norm(moved.T @ gram @ moved, capturable=ctx.capturable)
            ctx.stats["residual"], weights = solution.residual, solution.value
        else:
            weights = self._descend(independent(gram, ctx), target, ctx)
        ctx.state["weights"] = weights
        return (weights + self.lam * target) / (1 + self.lam)

    def _descend(self, products: Tensor, target: Tensor, ctx: Context) -> Tensor:
        """Follow the estimated gradient for some steps."""
        if self.lr is None:
            size, lr = torch.linalg.matrix_norm(products), 1.0  # at least the largest eigenvalue
        else:
            size, lr = products.diagonal().clamp(min=0).sqrt().mean() ** 2, self.lr
        products = products / size.where(size > 0, 1)
        weights = ctx.state["weights"]
        speed = torch.zeros_like(weights)
        for _ in range(self.n_iter):
            speed = self.momentum * speed + products @ (weights + self.lam * target)
            weights = project_simplex(weights - lr * speed, capturable=ctx.capturable)
        return weights
