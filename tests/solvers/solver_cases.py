"""Task gradients on which the solvers are tried: goldens, families, edge cases."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

GOLDEN = {
    "J2": [[1, 0, 1], [-3, 1, 0]],
    "J3": [[2, 1, 0, -1], [-1, 3, 1, 0], [0, -4, 2, 6]],
    "JR": [[2, 0], [1, 1], [-1, 1]],
    "JP": [[1, 2, 0, 1], [2, 1, 1, 0], [0.5, 1, 3, 1]],
}
EDGES = {
    "one_row": [[3, 4]],
    "zero_row": [[0, 0], [1, 2]],
    "zero_row_of_three": [[1, 2], [0, 0], [-1, 1]],
    "two_zero_rows": [[0, 0], [1, 2], [0, 0], [3, -1]],
    "identical": [[1, 2], [1, 2], [1, 2]],
    "parallel": [[1, 2], [2, 4]],
    "opposite": [[1, 2], [-1, -2]],
    "opposite_and_one": [[1, 2], [-1, -2], [0, 1]],
    "crowded": [[1, 0], [1, 1], [0, 1], [-1, 2], [2, -1], [1, 3]],
    "surrounded": [[1, 0], [-1, 2], [-1, -2], [3, 1], [0, -1]],
    "all_zero": [[0, 0], [0, 0], [0, 0]],
}


def rows(table: list[list[float]]) -> Tensor:
    return torch.tensor(table, dtype=torch.float64)


def well_conditioned(m: int, generator: Generator) -> Tensor:
    return torch.randn(m, max(200, 4 * m), generator=generator, dtype=torch.float64)


def conflicting(m: int, generator: Generator) -> Tensor:
    return torch.randn(m, m + 2, generator=generator, dtype=torch.float64)


def half_rank(m: int, generator: Generator) -> Tensor:
    rank = max(1, m // 2)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    left[:, 0] = left[:, 0].abs() + 0.3  # a common half space: the hull does not hold 0
    return left @ torch.randn(rank, rank + 3, generator=generator, dtype=torch.float64)


def half_rank_stationary(m: int, generator: Generator) -> Tensor:
    jac = half_rank(m, generator)
    return jac - jac.mean(dim=0)  # the hull holds 0


def six_decades(m: int, generator: Generator) -> Tensor:
    norms = 10 ** torch.linspace(-3, 3, m, dtype=torch.float64)
    order = torch.randperm(m, generator=generator)
    return well_conditioned(m, generator) * norms[order].unsqueeze(1)


def correlated(m: int, generator: Generator) -> Tensor:
    return well_conditioned(m, generator) + well_conditioned(1, generator)[:, :1]


FAMILIES: dict[str, Callable[[int, Generator], Tensor]] = {
    "well_conditioned": well_conditioned,
    "conflicting": conflicting,
    "half_rank": half_rank,
    "six_decades": six_decades,
    "correlated": correlated,
}
SIZES = [2, 3, 8, 16, 40, 64]


def draw(family: str, m: int, seed: int = 0) -> Tensor:
    return FAMILIES[family](m, torch.Generator().manual_seed(seed))


def unit(jac: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows of length one (zero rows stay) and their norms, straight from the rows."""
    norms = jac.norm(dim=1)
    return jac / norms.where(norms > 0, 1).unsqueeze(1), norms
