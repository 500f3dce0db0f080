"""LDC-MTL: learned weights that bring the weighted losses to one level."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale, State
from gradbal.rules._registry import register


@register(
    "ldc_mtl",
    claims=[Claim.HOMOGENEOUS],
    paper="Xiao et al., 2025",
    year=2025,
)
@dataclass(frozen=True, kw_only=True)
class LDCMTL(LossRule):
    r"""Loss discrepancy control, over the model and the logits of :math:`s`.

    Minimise :math:`\sum_i s_i \ell_i + \lambda \sum_{i < m} |s_i \ell_i - s_{i+1} \ell_{i+1}|`
    with :math:`\ell_i = L_i / \tau_i` and :math:`s = \operatorname{softmax}(\text{logits})`.
    Where :math:`\sigma_i` is the sign of the i-th difference, the weights are
    :math:`s_i (1 + \lambda (\sigma_i - \sigma_{i-1})) / \tau_i`. Neighbours are compared, so the
    order of the tasks matters.

    Args:
        lam: :math:`\lambda`, the weight of the differences; above 1/2 weights may be negative.
        tau: :math:`\tau`, one per task, positive; None for 1 each; ``"first"`` for each task's
            first loss, which must be positive.

    Source:
        Xiao et al., arXiv 2502.08585, as the single objective of the authors' code, with a router
        that sees no features. There the first losses are divided by the least of them, which
        changes the length of the step alone, and would change it whenever that task is absent.
    """

    scale: ClassVar[Scale] = "mean"
    learned: ClassVar[tuple[str, ...]] = ("logits",)

    lam: float = 0.05
    tau: tuple[float, ...] | Literal["first"] | None = None

    def __post_init__(self) -> None:
        checks.at_least(self, 0, lam=self.lam)
        if isinstance(self.tau, str):
            checks.one_of(self, ("first",), tau=self.tau)
            return
        for value in self.tau or ():
            checks.positive(self, tau=value)

    @property
    def per_task(self) -> tuple[str, ...]:  # type: ignore[override]  # depends on an option
        return () if self.tau == "first" else ("tau",)

    def init(self, losses: Tensor) -> State:
        unknown = 0.0 if self.tau == "first" else 1.0
        return {"logits": torch.zeros_like(losses), "tau": torch.full_like(losses, unknown)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        tau = ctx.state["tau"]
        if self.tau == "first":
            checks.positive_losses(self, ctx.values, ctx.names)
            ctx.state["tau"] = tau = tau.where(tau > 0, losses)
        scaled = losses / tau
        shares = torch.softmax(ctx.state["logits"], dim=0)
        signs = -(shares * scaled).diff().sign()
        end = losses.new_zeros(1)
        pull = 1 + self.lam * signs.diff(prepend=end, append=end)
        slope = scaled * pull  # in the shares
        ctx.slopes["logits"] = shares * (slope - shares @ slope)
        return shares * pull / tau
