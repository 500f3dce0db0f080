"""MoDo: weights from two independent batches, so that noise does not bias them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale, State
from gradbal.rules._registry import register
from gradbal.solvers import project_simplex


@register(
    "modo", claims=[Claim.EQUIVARIANT, Claim.SIMPLEX], paper="Chen et al., NeurIPS 2023", year=2023
)
@dataclass(frozen=True, kw_only=True)
class MoDo(GramRule):
    r"""Multi-objective gradient with double sampling.

    The weights follow a projected gradient step towards the min-norm point,
    :math:`\lambda \leftarrow \Pi_\Delta(\lambda - \gamma (J_1 J_2^\top + \rho I) \lambda)`, then
    the direction is :math:`J^\top \lambda`. With task gradients :math:`J_1, J_2` from independent
    batches the product has no bias.

    With ``step(losses, second)`` the batch of the step and the second one are multiplied, with
    ``step(losses, second, third)`` the second and the third. With one batch it is multiplied by
    itself, which is biased.

    Args:
        gamma: Step size of the weights, in units of one over squared gradient norm.
        rho: Pull towards equal weights, in units of squared gradient norm.

    Source:
        Chen et al., NeurIPS 2023, algorithm 1, for three batches; the authors' code also has the
        form with two.
    """

    scale: ClassVar[Scale] = "mean"
    batches: ClassVar[tuple[int, ...]] = (1, 2, 3)

    gamma: float = 0.1
    rho: float = 0.1

    def __post_init__(self) -> None:
        checks.at_least(self, 0, gamma=self.gamma, rho=self.rho)

    def init(self, losses: Tensor) -> State:
        return {"weights": torch.full_like(losses, 1 / len(losses))}

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        weights = ctx.state["weights"]
        slope = independent(gram, ctx) @ weights + self.rho * weights
        ctx.state["weights"] = project_simplex(
            weights - self.gamma * slope, capturable=ctx.capturable
        )
        return ctx.state["weights"]


def independent(gram: Tensor, ctx: Context) -> Tensor:
    """Return the inner products between the last two batches, or within the only one."""
    return gram if ctx.cross is None else ctx.cross[-2, -1]
