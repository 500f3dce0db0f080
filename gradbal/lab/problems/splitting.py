"""Shares of the examples, and columns in units of their deviation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ROUNDING = 1e-12  # of a mean over equal numbers, relative; such a deviation is none


def shuffled(n: int, seed: int, *cuts: int) -> tuple[Tensor, ...]:
    """Shuffle examples and cut their row.

    Args:
        n: How many there are.
        seed: Of the order.
        cuts: Where a new part begins, as for slices.

    Returns:
        The numbers of the examples of each part, one part more than cuts.
    """
    return torch.from_numpy(np.random.default_rng(seed).permutation(n)).tensor_split(cuts)


def tenths(n: int, seed: int) -> tuple[Tensor, ...]:
    """Return the numbers of 80, 10 and 10 % of the examples."""
    return shuffled(n, seed, round(0.8 * n), round(0.9 * n))


def standardised(values: Tensor, known: Tensor) -> Tensor:
    """Return columns with mean 0 and deviation 1 over some rows, without those that are constant.

    Args:
        values: Shape ``[n, columns]``.
        known: Numbers of the rows that set mean and deviation, those for training.
    """
    mean, spread = _moments(values[known])
    varied = spread > 0
    return ((values - mean)[:, varied] / spread[varied]).float()


def in_deviations(
    owner: str, names: Sequence[str], values: Tensor, known: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return targets with mean 0 and deviation 1 over some rows; missing ones, NaN, stay missing.

    Args:
        owner: The problem.
        names: Of the tasks.
        values: Shape ``[n, tasks]``.
        known: Numbers of the rows for training.

    Returns:
        For each task the targets, shape ``[n]``, and the deviation they had.

    Raises:
        ValueError: If a target is the same in all these rows.
    """
    mean, spread = _moments(values[known])
    for name, deviation in zip(names, spread.tolist(), strict=True):
        if not deviation > 0:
            raise ValueError(
                f"{owner}: a target must vary in the training part, got {name!r} with one value "
                "there; choose another seed, or more examples."
            )
    scaled = ((values - mean) / spread).float()
    return dict(zip(names, scaled.T, strict=True)), dict(zip(names, spread.tolist(), strict=True))


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of the columns, exactly 0 where only rounding makes one."""
    mean = values.double().nanmean(dim=0)
    spread = (values - mean).square().nanmean(dim=0).sqrt()
    return mean, spread.where(spread > ROUNDING * mean.abs(), 0)
