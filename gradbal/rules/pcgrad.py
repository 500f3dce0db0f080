"""PCGrad: each gradient loses what conflicts with the others."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register


@register("pcgrad", claims=[Claim.HOMOGENEOUS], paper="Yu et al., NeurIPS 2020", year=2020)
@dataclass(frozen=True, kw_only=True)
class PCGrad(GramRule):
    r"""Projecting conflicting gradients.

    Every task gradient visits the others in turn and is projected onto the normal plane of each
    one with which it then conflicts; the projected gradients are summed. A task never visits
    itself, as in the paper (several public codes differ there).

    Args:
        order: In which order the others are visited: ``"random"``, drawn for each task and step,
            or ``"given"``, the order of the tasks.

    Source:
        Yu et al., NeurIPS 2020, algorithm 1, on coefficients: with :math:`g_i' = J^\top c` every
        inner product is an entry of :math:`G c`.
    """

    scale: ClassVar[Scale] = "sum"

    order: Literal["random", "given"] = "random"

    def __post_init__(self) -> None:
        checks.one_of(self, ("random", "given"), order=self.order)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        m = len(gram)
        if m == 2 and not ctx.capturable:  # in plain numbers, on the host faster than tensors
            (first, product), (_, second) = gram.tolist()
            lost = min(product, 0.0)
            return gram.new_tensor([1 - lost / (square or 1) for square in (first, second)])
        coefficients = torch.eye(m, dtype=gram.dtype, device=gram.device)
        diagonal = gram.diagonal()
        for others in visits(m, self.order, ctx, gram.device):
            squares = diagonal[others]
            products = (coefficients * gram[others]).sum(dim=1)
            ratio = products.clamp(max=0) / squares.where(squares > 0, 1)
            coefficients = coefficients.scatter_add(1, others[:, None], -ratio[:, None])
        return coefficients.sum(dim=0)


def visits(m: int, order: str, ctx: Context, device: torch.device) -> Tensor:
    """Say whom each task visits when.

    Returns:
        Task numbers, shape ``[m - 1, m]``: in round t task i visits entry ``[t, i]``; column i
        holds every other task once.
    """
    if order == "given" or m == 2:
        keys = torch.arange(m, dtype=torch.float64, device=device).expand(m, m).clone()
    else:
        source = ctx.generator
        keys = torch.rand(m, m, generator=source, dtype=torch.float64, device=source.device)
        keys = keys.to(device)
    keys.fill_diagonal_(torch.inf)  # the own task comes last and is left out
    return keys.argsort(dim=1)[:, : m - 1].T
