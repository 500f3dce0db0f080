"""FORUM: validation losses lowered under a first-order constraint from training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GradientRule, Rows, State
from gradbal.rules._learned import advance
from gradbal.rules._registry import register
from gradbal.rules.auto_lambda import last_closure
from gradbal.solvers.gram import combined, times
from gradbal.solvers.min_norm import min_norm
from gradbal.solvers.simplex_qp import simplex_qp


@register("forum", claims=[Claim.EQUIVARIANT], paper="Ye et al., ECAI 2024", year=2024)
@dataclass(frozen=True, kw_only=True)
class FORUM(GradientRule):
    r"""First-order multi-gradient bilevel optimisation.

    With :math:`\lambda = \operatorname{softmax}(z)` and :math:`\ell = \sum_i \lambda_i L_i`, let
    :math:`q = \ell(\theta) - \ell(\theta_T)` say how far training is from where T more steps would
    lead. The direction on parameters and logits together is :math:`\sum_i \bar\lambda_i F_i + \nu
    \nabla q`: the validation gradients :math:`F_i`, of unit length, with weights that solve

    .. math:: \min_{\tilde\lambda \in \Delta,\; \nu \ge 0} \tfrac12 \Bigl\lVert \sum_i
              \tilde\lambda_i F_i + \nu \nabla q \Bigr\rVert^2 - \nu \rho \lVert \nabla q \rVert^2,

    averaged over steps to :math:`\bar\lambda`, and :math:`\nu = \max(\bar\lambda^\top \pi, 0)` for
    :math:`\pi_i = \rho - F_i^\top \nabla q / \lVert \nabla q \rVert^2`, so that q falls, too.

    Call ``step(losses, train, val)``, where ``train`` is a function that returns the losses of the
    same training batch again, and ``val`` one for a validation batch, or its losses.

    Args:
        rho: How fast q must fall, positive.
        lr: Learning rate of the logits' Adam.
        inner_lr: Step size of the T steps.
        n_steps: Their number T.

    Source:
        Ye et al., ECAI 2024, algorithm 1; :math:`\partial \theta_T` is ignored as there. The
        quadratic has the factor 1/2 of the derivation, which the authors' code leaves out.
    """

    probes: ClassVar[bool] = True
    batches: ClassVar[tuple[int, ...]] = (3,)
    learned: ClassVar[tuple[str, ...]] = ("logits",)
    learner = "adam"

    rho: float = 0.1
    lr: float = 1e-3
    inner_lr: float = 0.1
    n_steps: int = 5

    def __post_init__(self) -> None:
        checks.positive(self, rho=self.rho, lr=self.lr, inner_lr=self.inner_lr)
        checks.of_type(self, int, n_steps=self.n_steps)
        checks.at_least(self, 1, n_steps=self.n_steps)

    @property
    def learned_lr(self) -> float:  # type: ignore[override]  # an option under another name
        return self.lr

    def init(self, losses: Tensor) -> State:
        return {name: torch.zeros_like(losses) for name in ("logits", "average")}

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> Sequence[Tensor]:
        shares = torch.softmax(ctx.state["logits"], dim=0)
        slope = combined(shares, grads)
        fall = ctx.losses - self._losses_later(slope, shares, ctx).to(ctx.losses.device)
        on_logits = shares * (fall - shares @ fall)
        upper = self._upper(slope, ctx)
        products = ctx.gram(
            [torch.cat((rows, q[None])) for rows, q in zip(upper, slope, strict=True)]
        )
        inner, along = products[:-1, :-1], products[:-1, -1]
        square = products[-1, -1] + on_logits @ on_logits
        pull = self.rho - along / square if square > 0 else torch.zeros_like(along)
        newest = self._solve(inner, along, square, pull, ctx)
        share = (1 + ctx.epoch.double()) ** -0.75
        ctx.state["average"] = weights = ctx.state["average"].lerp(newest, share)
        force = (weights @ pull).clamp(min=0)
        ctx.stats["weight"] = weights
        advance(self, ctx.state, "logits", force * on_logits, None, ctx.lr, "adam")
        pairs = zip(combined(weights, upper), slope, strict=True)
        return [part + force.to(part) * q for part, q in pairs]

    def _losses_later(self, slope: Rows, shares: Tensor, ctx: Context) -> Tensor:
        """Return the training losses after T more steps."""
        train = ctx.more[0]
        if not callable(train):
            last_closure(self, ctx)  # says what is missing
        way = slope
        for _ in range(self.n_steps - 1):
            _, rows = ctx.probe(way, self.inner_lr, train, weights=shares[None])
            way = [part + row[0] for part, row in zip(way, rows, strict=True)]
        return ctx.probe(way, self.inner_lr, train, weights=shares.new_empty(0, len(shares))).losses

    def _upper(self, like: Rows, ctx: Context) -> Rows:
        """Return the validation gradients, of unit length."""
        rows = ctx.more[1]
        if callable(rows):
            rows = ctx.probe([torch.zeros_like(part) for part in like], 0.0, rows).rows
        norms = ctx.gram(rows).diagonal().sqrt()
        return times(rows, 1 / norms.where(norms > 0, torch.inf))

    def _solve(
        self, inner: Tensor, along: Tensor, square: Tensor, pull: Tensor, ctx: Context
    ) -> Tensor:
        """Return the weights of the quadratic problem; where nu is positive it is eliminated."""
        if square > 0:
            beside = inner - torch.outer(along, along) / square
            solution = simplex_qp(beside, self.rho * along)
            if solution.value @ pull >= 0:
                ctx.stats["residual"] = solution.residual
                return solution.value
        solution = min_norm(inner)
        ctx.stats["residual"] = solution.residual
        return solution.value
