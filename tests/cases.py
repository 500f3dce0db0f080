"""Awkward task gradients, float64, and losses to go with them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gradbal import aggregate
from gradbal.aggregation import Aggregation
from gradbal.rules._base import GradientRule, Rule
from gradbal.rules._registry import RULES, make_rule

J2 = [[1, 0, 1], [-3, 1, 0]]
J3 = [[2, 1, 0, -1], [-1, 3, 1, 0], [0, -4, 2, 6]]
JR = [[2, 0], [1, 1], [-1, 1]]
JP = [[1, 2, 0, 1], [2, 1, 1, 0], [0.5, 1, 3, 1]]
SIZES = (1, 2, 3, 8, 16)
ANGLES = torch.tensor([0, 0.4, 0.8, 1.2, 1.57], dtype=torch.float64)
FIVE = tuple(
    zip(ANGLES.cos().tolist(), ANGLES.sin().tolist(), strict=True)
)  # directions of two tasks

ONE_BATCH = tuple(name for name in RULES if min(RULES[name].rule.batches) == 1)
WEIGHTED = tuple(name for name in ONE_BATCH if getattr(make_rule(name), "weighted", True))


def rows(table: list[list[float]]) -> Tensor:
    return torch.tensor(table, dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def losses_for(m: int, seed: int = 0) -> Tensor:
    """Losses above 1, so that their logarithms are losses, too."""
    return 1.5 + 10 * torch.rand(m, generator=seeded(seed), dtype=torch.float64)


def wells(point: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Losses below 1 with their minima on the unit sphere, and their gradients."""
    centres = torch.nn.functional.normalize(normal(m, len(point), seed=7), dim=1)
    gaps = point - centres
    depths = torch.exp(-gaps.square().sum(dim=1))
    return 1 - depths, 2 * depths[:, None] * gaps


def conflicting(m: int, seed: int = 0) -> Tensor:
    """Rows that nearly cancel: cosines about -1 / (m - 1), 0 just outside of the hull."""
    spread = normal(m, m + 2, seed=seed)
    return spread - 0.95 * spread.mean(dim=0)


def correlated(m: int, seed: int = 0) -> Tensor:
    return normal(m, m + 4, seed=seed) + 5 * normal(1, m + 4, seed=seed + 1)


def rank_deficient(m: int, rank: int, seed: int = 0) -> Tensor:
    """Rows in a half space of few dimensions, so that the hull does not hold 0."""
    left = normal(m, rank, seed=seed)
    left[:, 0] = left[:, 0].abs() + 0.3
    return left @ normal(rank, m + 3, seed=seed + 1)


def decades(m: int, seed: int = 0) -> Tensor:
    """Row norms spread over six decades, in no order."""
    norms = 10 ** torch.linspace(-3, 3, m, dtype=torch.float64)
    order = torch.randperm(m, generator=seeded(seed))
    return normal(m, m + 5, seed=seed) * norms[order, None]


def _jacobians() -> Iterator[tuple[str, Tensor]]:
    yield from {"J2": rows(J2), "J3": rows(J3), "JR": rows(JR), "JP": rows(JP)}.items()
    yield "one task", rows([[3, 4]])
    yield "one task without gradient", rows([[0, 0]])
    yield "zero row", rows([[0, 0], [1, 2]])
    yield "zero rows among others", rows([[0, 0, 0], [1, 2, 1], [0, 0, 0], [3, -1, 2]])
    yield "all zero", rows([[0, 0], [0, 0], [0, 0]])
    yield "identical", rows([[1, 2], [1, 2], [1, 2]])
    yield "parallel", rows([[1, 2], [2, 4], [3, 6]])
    yield "opposite", rows([[1, 2], [-1, -2]])
    yield "opposite and one", rows([[1, 2], [-1, -2], [0, 1]])
    yield "nearly opposite", rows([[1, 0], [-1, 1e-3]])
    yield "a hundred apart", rows([[1, 0], [-100, 100]])
    yield "surrounded", rows([[1, 0], [-1, 2], [-1, -2], [3, 1], [0, -1]])
    yield "more tasks than parameters", rank_deficient(8, 3, seed=3)[:, :3]
    yield "rank deficient", rank_deficient(8, 4, seed=5)
    yield "one a million times larger", normal(3, 6, seed=7) * rows([[1], [1e6], [1]])
    yield "tiny", normal(3, 6, seed=8) * 1e-12
    yield "huge", normal(3, 6, seed=8) * 1e12
    for m in (3, 8):
        yield f"six decades, m={m}", decades(m, seed=m)
    for m in SIZES:
        yield f"any, m={m}", normal(m, 2 * m, seed=10 + m)
        if m > 1:
            yield f"conflicting, m={m}", conflicting(m, seed=20 + m)
            yield f"correlated, m={m}", correlated(m, seed=30 + m)


JACOBIANS = dict(_jacobians())
FEW = {
    name: JACOBIANS[name]
    for name in (
        "J3",
        "JR",
        "one task",
        "zero rows among others",
        "all zero",
        "identical",
        "opposite",
        "surrounded",
        "one a million times larger",
        "tiny",
        "conflicting, m=8",
    )
}


def further(rule: Rule, jacobian: Tensor, losses: Tensor) -> list[Any]:
    """Further batches for rules that cannot do without: all alike, wherever one looks."""
    probes = isinstance(rule, GradientRule) and rule.probes
    return [(lambda shift: (losses, jacobian)) if probes else jacobian] * (min(rule.batches) - 1)


def combine(jacobian: Tensor, rule: Rule, losses: Tensor, state: Any = None) -> Aggregation:
    """Aggregate, also by rules that look at several batches."""
    more = further(rule, jacobian, losses)
    return aggregate(jacobian, rule, losses=losses, more=more, state=state)


def keeps_gradients(rule: Rule) -> bool:
    """Say whether a rule's state grows with the parameters."""
    return isinstance(rule, GradientRule) and bool(rule.buffers(torch.zeros(2, 1)))
