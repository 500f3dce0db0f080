"""GO4Align: tasks in groups of similar risk, one weight for each group."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, LossRule, Scale, State
from gradbal.rules._registry import register


@register(
    "go4align",
    claims=[Claim.EQUIVARIANT, Claim.HOMOGENEOUS],
    paper="Shen et al., NeurIPS 2024",
    year=2024,
)
@dataclass(frozen=True, kw_only=True)
class GO4Align(LossRule):
    r"""Group optimization for multi-task alignment.

    Shares that start equal descend, :math:`q_i \leftarrow q_i e^{-\beta L_i}`, and are
    normalised; absent tasks keep theirs. The risks
    :math:`\omega_i = q_i \sum_j L_j / L_i` are put into groups by k-means, and every task gets
    the mean risk of its group as weight. All losses must be positive.

    Args:
        beta: :math:`\beta`, in units of one over loss.
        groups: How many groups, at most; with 1 all tasks have the same weight.

    Source:
        Shen et al., NeurIPS 2024, in the form of the authors' code, whose 1 group would balance
        nothing. Optimal clusters of numbers are intervals and found exactly by dynamic programming
        (Wang and Song, R Journal 2011), instead of k-means from a random start.
    """

    scale: ClassVar[Scale] = "sum"

    beta: float = 1e-4
    groups: int = 2

    def __post_init__(self) -> None:
        checks.at_least(self, 0, beta=self.beta)
        checks.of_type(self, int, groups=self.groups)
        checks.at_least(self, 1, groups=self.groups)

    def init(self, losses: Tensor) -> State:
        return {"logits": torch.zeros_like(losses)}

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        checks.positive_losses(self, ctx.values, ctx.names)
        logits, own = ctx.state["logits"], torch.logsumexp(ctx.state["logits"], dim=0)
        logits = torch.log_softmax(logits - self.beta * losses, dim=0)
        ctx.state["logits"] = logits + own
        return cluster_means(logits.exp() * losses.sum() / losses, self.groups)


def cluster_means(values: Tensor, groups: int) -> Tensor:
    """Return for each number the mean of its cluster, in an optimal clustering of all.

    Squared distances are summed over pairs and never subtracted, so nothing cancels. Nothing is
    read back and the number of operations is fixed: of size m x m, ``groups`` times.

    Args:
        values: Numbers, shape ``[m]``.
        groups: How many clusters; where m is not more, every number is one.

    Returns:
        The means, shape ``[m]``.
    """
    if len(values) <= groups:
        return values
    ordered, order = values.sort()
    index = torch.arange(len(values), device=values.device)
    pairs = (ordered - ordered[:, None]).square().triu()
    sizes = (index - index[:, None] + 1).clamp(min=1)
    inside = pairs.flip(0).cumsum(0).flip(0).cumsum(1) / sizes  # [i, j]: a cluster from i to j
    inside = inside.masked_fill(index < index[:, None], torch.inf)
    best, first = inside[0], []
    for _ in range(groups - 1):
        before = torch.cat((best.new_full((1,), torch.inf), best[:-1]))
        costs = before[:, None] + inside
        first.append(costs.argmin(dim=0))
        best = costs.gather(0, first[-1][None])[0]
    cluster, last = torch.zeros_like(index), index[-1:]
    for starts in reversed(first):
        start = starts.gather(0, last)
        cluster = cluster + (index >= start)
        last = (start - 1).clamp(min=0)  # below 0 only where a value is not a number
    members = (cluster == index[:groups, None]).to(values.dtype)
    means = members @ ordered / members.sum(dim=1)
    return values.scatter(0, order, means.gather(0, cluster))
