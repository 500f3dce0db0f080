"""Task gradients divided by their norm or their loss."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context
from gradbal.rules.transforms.transform import Transform


@dataclass(frozen=True, kw_only=True)
class Normalize(Transform):
    r"""Give the rule, and combine, the gradients :math:`g_i / s_i` in place of :math:`g_i`.

    Other than in ``mgda(normalize=...)``, whose weights are applied to the gradients as they are,
    the direction is made of the divided gradients. A zero gradient stays.

    Args:
        by: :math:`s_i`: the norm of the gradient (``"l2"``), the loss (``"loss"``) or their
            product (``"loss+"``), named as in ``mgda``.

    Source:
        Sener and Koltun, NeurIPS 2018, the normalisations of their experiments.
    """

    by: Literal["l2", "loss", "loss+"] = "l2"

    def __post_init__(self) -> None:
        checks.one_of(self, ("l2", "loss", "loss+"), by=self.by)

    @property
    def needs_losses(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.by != "l2"

    @property
    def needs_norms(self) -> bool:  # type: ignore[override]  # depends on an option
        return self.by != "loss"

    def sizes(self, norms: Tensor, ctx: Context) -> Tensor:
        if self.needs_losses:
            checks.positive_losses(self, ctx.values, ctx.names)
        losses = ctx.losses if self.needs_losses else torch.ones_like(norms)
        return losses * norms.where(norms > 0, 1) if self.needs_norms else losses

    def keep(self, claims: frozenset[Claim]) -> frozenset[Claim]:
        claims = claims - {Claim.SIMPLEX, Claim.SUMS_TO_TASKS}
        if self.needs_norms:
            claims = claims - {Claim.HOMOGENEOUS, Claim.LINEAR} | {Claim.SCALE_FREE}
        return claims
