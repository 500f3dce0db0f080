"""No task's loss rises to first order, in the precision of the rows, on dependent gradients too."""

from collections.abc import Callable, Iterator

import pytest
import torch
from cases import seeded
from models import fill
from torch import Generator, Tensor, nn

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules._base import Claim, GramRule
from gradbal.rules._registry import RULES

PROMISING = [name for name, entry in RULES.items() if Claim.NON_CONFLICTING in entry.claims]
UNITS = {torch.float64: 0.0, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
SIZES = (2, 3, 5, 17, 40)


def draw(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dependent(m: int, generator: Generator) -> Tensor:
    some = draw(generator, m - 1, 200)
    return torch.cat([some, some.sum(0, keepdim=True)])


def opposed(m: int, generator: Generator) -> Tensor:
    some = draw(generator, (m + 1) // 2, 50)
    return torch.cat([some, -some])[:m]


def duplicated(m: int, generator: Generator) -> Tensor:
    some = draw(generator, (m + 1) // 2, 30)
    return torch.cat([some, some])[:m]


def centred(m: int, n: int, generator: Generator) -> Tensor:
    some = draw(generator, m, n)
    return some - some.mean(dim=0)


FAMILIES: dict[str, Callable[[int, Generator], Tensor]] = {
    "fewer columns than rows": lambda m, g: draw(g, m, max(1, m // 2)),
    "one column": lambda m, g: draw(g, m, 1),
    "opposed": opposed,
    "dependent": dependent,
    "duplicated": duplicated,
    "nearly parallel": lambda m, g: draw(g, 1, 100) + 1e-6 * draw(g, m, 100),
    "six decades": lambda m, g: (
        draw(g, m, 20) * 10 ** torch.linspace(-3, 3, m, dtype=torch.float64)[:, None]
    ),
    "conflicting": lambda m, g: draw(g, m, 400) - 0.98 * draw(g, 1, 400),
    "long": lambda m, g: centred(m, 100_000 // m, g),
}


def draws(seeds: range) -> Iterator[tuple[str, int, Tensor]]:
    for seed in seeds:
        for m in SIZES:
            for name, family in FAMILIES.items():
                yield name, m, family(m, seeded(100 * seed + m))


@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("rule", PROMISING)
def test_no_loss_rises(rule: str, dtype: torch.dtype) -> None:
    hold(rule, dtype, range(1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.parametrize("rule", PROMISING)
def test_no_loss_rises_in_many_draws(rule: str, dtype: torch.dtype) -> None:
    hold(rule, dtype, range(1, 100))


def hold(rule: str, dtype: torch.dtype, seeds: range) -> None:
    for family, m, exact in draws(seeds):
        rows, losses = exact.to(dtype), torch.linspace(1, 2, m)
        found = aggregate(rows, rule, losses=losses)
        rise = excess(rows, found.direction, found.weights, dtype)
        assert rise <= 1, f"{family}, {m} tasks: {rise:.1f}"


def excess(rows: Tensor, direction: Tensor, weights: Tensor | None, dtype: torch.dtype) -> float:
    """Return how far the worst loss rises, in units of what rounding explains."""
    wide, found = rows.double(), direction.double()
    norms, length = wide.norm(dim=1), found.norm()
    terms = length if weights is None else weights.double().abs() @ norms
    if dtype == torch.float64:
        allowed = 1e-8 * norms * terms
    else:
        allowed = norms * (UNITS[dtype] * length + 4 * 2.0**-24 * terms)
    return (-(wide @ found) / allowed.clamp(min=1e-300)).max().item()


class Pair(nn.Module):
    """A trunk and two heads."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48))
        self.heads = nn.ModuleList(nn.Linear(48, 4) for _ in range(2))
        fill(self).to(dtype)

    def direction(self, rule: str, *, autocast: bool) -> Tensor:
        """Return what the trunk gets for two losses and their sum as a third."""
        dtype = self.heads[0].weight.dtype
        x, y = draw(seeded(1), 64, 32).to(dtype), draw(seeded(2), 2, 64, 4).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            z = self.trunk(x)
            outputs = [head(z) for head in self.heads]
        a, b = ((o.to(y.dtype) - t).square().mean() for o, t in zip(outputs, y, strict=True))
        optimizer = MTLOptimizer(torch.optim.SGD(self.parameters(), lr=0.1), rule)
        optimizer.backward([a, b, a + b])
        return torch.cat([p.grad.double().flatten() for p in self.trunk.parameters()])


SOLVING = [
    name
    for name in ("upgrad", "config", "imtl_g", "aligned_mtl", "mgda", "cagrad", "nash_mtl")
    if isinstance(make_rule(name), GramRule)
]


@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float32, False, 1e-2),
        (torch.bfloat16, False, 1e-1),
        (torch.float32, True, 1e-1),
    ],
    ids=["float32", "bfloat16", "autocast"],
)
@pytest.mark.parametrize("rule", SOLVING)
def test_a_loss_that_is_the_sum_of_others(
    rule: str, dtype: torch.dtype, autocast: bool, tolerance: float
) -> None:
    """Rank is decided by the noise of the rows, so that dependent ones stay dependent."""
    wanted = Pair(torch.float64).direction(rule, autocast=False)
    found = Pair(dtype).direction(rule, autocast=autocast)
    assert (found - wanted).norm() <= tolerance * wanted.norm()
