"""Krum: the task gradients that lie closest to the others."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import Claim, Context, GramRule, Scale
from gradbal.rules._registry import register

TIE = 32  # rounding errors of the Gram matrix within which two scores are the same


@register(
    "krum",
    claims=[Claim.HOMOGENEOUS, Claim.SIMPLEX],
    paper="Blanchard et al., NIPS 2017",
    year=2017,
)
@dataclass(frozen=True, kw_only=True)
class Krum(GramRule):
    r"""Multi-Krum: the mean of the gradients with the lowest scores.

    The score of a task is the sum of its squared distances to its :math:`m - f - 2` nearest
    neighbours, so that up to :math:`f` gradients may be anything without doing harm. Of equal
    scores the first task's counts as lower. A zero gradient is a vote like any other.

    Args:
        n_byzantine: :math:`f`, tasks not to be trusted; there must be at least :math:`f + 3`
            tasks. None for the largest number that the authors' theorem allows; then one or two
            tasks are averaged, for neither is closer to the others.
        n_selected: How many gradients are averaged; at most as many as there are tasks.
        squared: Add squared distances, as in the paper, or distances.

    Source:
        Blanchard et al., NIPS 2017: the Krum function, and Multi-Krum of their experiments.
    """

    scale: ClassVar[Scale] = "mean"

    n_byzantine: int | None = None
    n_selected: int = 1
    squared: bool = True

    def __post_init__(self) -> None:
        if self.n_byzantine is not None:
            checks.of_type(self, int, n_byzantine=self.n_byzantine)
            checks.at_least(self, 0, n_byzantine=self.n_byzantine)
        checks.of_type(self, int, n_selected=self.n_selected)
        checks.at_least(self, 1, n_selected=self.n_selected)
        checks.one_of(self, (True, False), squared=self.squared)

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        m = len(gram)
        if m < 3 and self.n_byzantine is None:
            return gram.new_full((m,), 1 / m)
        near = self._neighbours(m) + 1  # with itself, at distance 0
        if not ctx.capturable:
            return torch.from_numpy(self._on_host(gram.numpy(), near, TIE * ctx.eps))
        squares = gram.diagonal()
        distances = torch.add(squares + squares.unsqueeze(1), gram, alpha=-2).clamp(min=0)
        distances = distances.topk(near, largest=False).values
        # a distance has the rounding of both its squared norms, which are at most this together
        errors = TIE * ctx.eps * (3 * squares.unsqueeze(1) + 2 * distances)
        if not self.squared:
            errors, distances = (distances + errors).sqrt(), distances.sqrt()
            errors = errors - distances
        scores, errors = distances.sum(dim=1), errors.sum(dim=1)
        beyond = scores - scores.kthvalue(self.n_selected).values
        places = (beyond - beyond.clamp(-errors, errors)).sign()  # 0 for a tie with the last one
        chosen = places.argsort(stable=True)[: self.n_selected]
        return torch.zeros_like(scores).index_fill(0, chosen, 1 / self.n_selected)

    def _on_host(self, gram: np.ndarray, near: int, tie: float) -> np.ndarray:
        """Do the same in NumPy, which is faster there."""
        squares = gram.diagonal()[:, None]
        distances = np.maximum(squares + squares.T - 2 * gram, 0)
        distances = np.partition(distances, near - 1, axis=1)[:, :near]
        errors = tie * (3 * squares + 2 * distances)
        if not self.squared:
            errors, distances = np.sqrt(distances + errors), np.sqrt(distances)
            errors = errors - distances
        scores, errors = distances.sum(axis=1), errors.sum(axis=1)
        beyond = scores - np.sort(scores)[self.n_selected - 1]
        places = np.sign(beyond) * (np.abs(beyond) > errors)
        weights = np.zeros(len(gram))
        weights[places.argsort(kind="stable")[: self.n_selected]] = 1 / self.n_selected
        return weights

    def _neighbours(self, m: int) -> int:
        """Return how many neighbours count, or tell that there are too few tasks."""
        f = (m - 3) // 2 if self.n_byzantine is None else self.n_byzantine
        if m < f + 3:
            raise ValueError(
                f"Krum: `n_byzantine` must be at most the number of tasks minus 3, got {f} with "
                f"{m} tasks."
            )
        checks.between(self, 1, m, n_selected=self.n_selected)
        return m - f - 2
