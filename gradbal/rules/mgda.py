"""MGDA: the shortest vector in the convex hull of the task gradients."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register
from gradbal.solvers import cvxpy_min_norm, min_norm


@register(
    "mgda",
    claims=[Claim.NON_CONFLICTING, Claim.EQUIVARIANT, Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Désidéri, C. R. Acad. Sci. 2012; Sener & Koltun, NeurIPS 2018",
    year=2012,
)
@dataclass(frozen=True, kw_only=True)
class MGDA(GramRule):
    r"""Min-norm point: :math:`\min_{w \in \Delta} \tfrac12 w^\top G w`.

    Every task gets :math:`g_i^\top d \ge \lVert d \rVert^2`, and :math:`d = 0` exactly where the
    losses are Pareto stationary; so a task whose gradient is zero stops all others.

    Args:
        normalize: What each gradient is divided by before solving: ``"none"``, its norm
            (``"l2"``), its loss (``"loss"``) or both (``"loss+"``). The weights found are then
            applied to the gradients as they are, as in the authors' experiments.
        solver: ``"exact"`` or the slow reference ``"cvxpy"``.

    Source:
        Sener and Koltun, NeurIPS 2018, eq. 3; solved exactly, without their bounds .001 and .999
        at two tasks.
    """

    scale: ClassVar[Scale] = "mean"

    normalize: Literal["none", "l2", "loss", "loss+"] = "none"
    solver: Literal["exact", "cvxpy"] = "exact"

    def __post_init__(self) -> None:
        checks.one_of(self, ("none", "l2", "loss", "loss+"), normalize=self.normalize)
        checks.one_of(self, ("exact", "cvxpy"), solver=self.solver)

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.normalize in ("loss", "loss+")

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        if self.solver == "cvxpy":
            solution = cvxpy_min_norm(self._normalized(gram, ctx))
        else:
            solution = min_norm(self._normalized(gram, ctx), capturable=ctx.capturable)
        ctx.stats["residual"] = solution.residual
        return solution.value

    def _normalized(self, gram: Tensor, ctx: Context) -> Tensor:
        if self.normalize == "none":
            return gram
        size = torch.ones_like(ctx.losses)
        if self.normalize != "l2":
            checks.positive_losses(self, ctx.values, ctx.names)
            size = size * ctx.losses
        if self.normalize != "loss":
            norms = gram.diagonal().sqrt()
            size = size * norms.where(norms > 0, 1)
        return gram / torch.outer(size, size)
