"""GroupDRO: weight moves to the tasks with the largest losses."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale, State
from gradbal.rules._registry import register


@register(
    "group_dro",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SUMS_TO_TASKS],
    paper="Sagawa et al., ICLR 2020",
    year=2020,
)
@dataclass(frozen=True, kw_only=True)
class GroupDRO(LossRule):
    r"""Distributionally robust optimization: :math:`\min_\theta \max_{q \in \Delta} q^\top L`.

    Before each step the weights ascend, :math:`q_i \leftarrow q_i e^{\eta L_i}`, and are
    normalised. Absent tasks keep theirs; the present ones share out what they had together.

    Args:
        step_size: :math:`\eta`, in units of one over loss.
        reduction: ``"sum"``: weights that sum to m; ``"mean"``: to 1.

    Source:
        Sagawa et al., ICLR 2020, algorithm 1, with the losses of all present groups at once and
        in logarithms, so that no weight is lost to rounding. The paper's weights sum to 1; in the
        multi-task code that has the method as a baseline (ExcessMTL) they sum to m.
    """

    scale: ClassVar[Scale] = "sum"

    step_size: float = 0.01
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        checks.positive(self, step_size=self.step_size)
        checks.one_of(self, ("sum", "mean"), reduction=self.reduction)

    def init(self, losses: Tensor) -> State:
        return {"logits": torch.zeros_like(losses)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        logits, own = ctx.state["logits"], torch.logsumexp(ctx.state["logits"], dim=0)
        logits = torch.log_softmax(logits + self.step_size * losses, dim=0)
        ctx.state["logits"] = logits + own
        total = len(losses) if self.reduction == "sum" else 1
        return total * logits.exp()
