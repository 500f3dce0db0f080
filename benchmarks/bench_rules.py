"""Aggregation alone, against TorchJD: `python -m benchmarks.bench_rules` (extra `bench`)."""

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchjd.aggregation as peer
from torch import Tensor
from torch.utils.benchmark import Timer

from gradbal import aggregate, make_rule
from gradbal._utils.tables import markdown_table
from gradbal.rules._base import Rule

Call = Callable[[Tensor], Tensor]  # task gradients [m, n] -> direction [n]

TASKS = (2, 3, 8, 16, 40, 128)
WIDE = ("graddrop", "config")  # also at 8 x 1,000,000


@dataclass(frozen=True)
class Pair:
    """One rule in both libraries, with the same options."""

    ours: Rule
    theirs: Callable[[int], Call]
    least: int = 1  # fewest tasks


def gramian(weighting: Any) -> Call:
    call: Call = peer.GramianWeightedAggregator(weighting)
    return call


def crossed(weighting: Any) -> Call:
    """Apply a weighting of two batches, both the same here."""
    return lambda jacobian: weighting(jacobian @ jacobian.T) @ jacobian


PAIRS: dict[str, Pair] = {
    "ew": Pair(make_rule("ew"), lambda m: peer.Sum()),
    "ew mean": Pair(make_rule("ew", reduction="mean"), lambda m: peer.Mean()),
    "constant": Pair(make_rule("constant"), lambda m: peer.Constant(torch.ones(m))),
    "rlw": Pair(make_rule("rlw"), lambda m: peer.Random()),
    "aligned_mtl": Pair(make_rule("aligned_mtl"), lambda m: peer.AlignedMTL()),
    "cagrad": Pair(make_rule("cagrad", rescale=None), lambda m: peer.CAGrad(c=0.4)),
    "config": Pair(make_rule("config"), lambda m: peer.ConFIG()),
    "cr_mogm": Pair(
        make_rule("cr_mogm"), lambda m: gramian(peer.CRMOGMWeighting(peer.MGDAWeighting()))
    ),
    "dualproj": Pair(make_rule("dualproj"), lambda m: peer.DualProj()),
    "excess_mtl": Pair(make_rule("excess_mtl"), lambda m: peer.ExcessMTL(0.01)),
    "fairgrad": Pair(make_rule("fairgrad"), lambda m: peer.FairGrad(alpha=2.0)),
    "graddrop": Pair(make_rule("graddrop"), lambda m: peer.GradDrop()),
    "gradvac": Pair(make_rule("gradvac"), lambda m: peer.GradVac()),
    "imtl_g": Pair(make_rule("imtl_g"), lambda m: peer.IMTLG()),
    "krum": Pair(make_rule("krum", n_byzantine=0), lambda m: peer.Krum(n_byzantine=0), 3),
    "mgda": Pair(make_rule("mgda"), lambda m: peer.MGDA()),
    "modo": Pair(make_rule("modo"), lambda m: crossed(peer.MoDoWeighting())),
    "nash_mtl": Pair(make_rule("nash_mtl"), lambda m: peer.NashMTL(n_tasks=m)),
    "pcd": Pair(make_rule("pcd"), lambda m: peer.PCD()),
    "pcgrad": Pair(make_rule("pcgrad"), lambda m: peer.PCGrad()),
    "sdmgrad": Pair(make_rule("sdmgrad", lr=10.0), lambda m: crossed(peer.SDMGradWeighting())),
    "trimmed_mean": Pair(
        make_rule("trimmed_mean", n_trimmed=1), lambda m: peer.TrimmedMean(trim_number=1), 3
    ),
    "upgrad": Pair(make_rule("upgrad"), lambda m: peer.UPGrad()),
}


class Ours:
    """A rule as a function of the Jacobian that goes on where it stopped."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.state = rule, None

    def __call__(self, jacobian: Tensor) -> Tensor:
        result = aggregate(jacobian, self.rule, state=self.state)
        self.state = result.state  # type: ignore[assignment]  # from the second call on
        return result.direction


# ---------------------------------------------------------------------------- how right


def cosines_of(jacobian: Tensor, direction: Tensor) -> Tensor:
    return jacobian @ direction / jacobian.norm(dim=1) / direction.norm()


def conflict(jacobian: Tensor, direction: Tensor) -> float:
    """Largest negative cosine: 0 for a direction in conflict with no task."""
    return max(0.0, -cosines_of(jacobian, direction).min().item())


def spread(jacobian: Tensor, direction: Tensor) -> float:
    """How far the cosines with the tasks are from being equal."""
    cosines = cosines_of(jacobian, direction)
    return ((cosines.max() - cosines.min()) / cosines.abs().max()).item()


def gap(jacobian: Tensor, direction: Tensor) -> float:
    """How much nearer some task is than the shortest vector of the hull, relative to its norm."""
    square = direction @ direction
    return (1 - (jacobian @ direction).min() / square).item()


def unfairness(jacobian: Tensor, direction: Tensor, alpha: float) -> float:
    """Largest relative error of ``(G x)_i = x_i^(-1/alpha)``, up to a common factor."""
    weights = torch.linalg.lstsq(jacobian.T, direction).solution
    products = weights.clamp(min=0) ** (1 / alpha) * (jacobian @ direction)
    return (products.max() / products.min().clamp(min=1e-300) - 1).item()


RESIDUALS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "config": spread,
    "imtl_g": conflict,
    "dualproj": conflict,
    "upgrad": conflict,
    "mgda": gap,
    "nash_mtl": partial(unfairness, alpha=1.0),
    "fairgrad": partial(unfairness, alpha=2.0),
}


def residuals(name: str, pair: Pair, m: int) -> tuple[float, float] | None:
    """Recompute, in float64, how well both solve the rule's problem on norms decades apart."""
    if name not in RESIDUALS:
        return None
    generator = torch.Generator().manual_seed(m)
    norms = 10 ** (2 * torch.rand(m, 1, generator=generator, dtype=torch.float64) - 1)
    jacobian = norms * torch.randn(m, m + 2, generator=generator, dtype=torch.float64)
    found = (call(jacobian) for call in (Ours(pair.ours), pair.theirs(m)))
    ours, theirs = (RESIDUALS[name](jacobian, direction) for direction in found)
    return ours, theirs


# ---------------------------------------------------------------------------- how fast


@dataclass
class Cell:
    """Medians in microseconds, with the spread between their rounds, and residuals."""

    rule: str
    m: int
    n: int
    ours: float
    theirs: float
    spread: float
    residual: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


def measure(name: str, pair: Pair, m: int, n: int, seconds: float, rounds: int) -> Cell:
    """Time both in turn, some rounds of each."""
    jacobian = torch.randn(m, n, generator=torch.Generator().manual_seed(m))
    calls: Sequence[Call] = (Ours(pair.ours), pair.theirs(m))
    timers = [Timer("call(jacobian)", globals={"call": c, "jacobian": jacobian}) for c in calls]
    numbers = []
    for timer in timers:
        timer.timeit(1)
        once = timer.timeit(1).median
        numbers.append(max(1, math.ceil(seconds / rounds / once)))
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for row, timer, number in zip(times, timers, numbers, strict=True):
            row.append(1e6 * timer.timeit(number).median)
    ours, theirs = map(median, times)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    spread_of = (max(ratios) - min(ratios)) / median(ratios)
    residual = residuals(name, pair, m) if n <= 10_000 else None
    return Cell(name, m, n, ours, theirs, spread_of, residual)


def cells(names: Iterable[str], tasks: Iterable[int], seconds: float, rounds: int) -> list[Cell]:
    """Measure all pairs."""
    found = []
    for name in names:
        sizes = [(m, 2000) for m in tasks if m >= PAIRS[name].least]
        sizes += [(8, 1_000_000)] if name in WIDE else []
        found += [measure(name, PAIRS[name], *size, seconds, rounds) for size in sizes]
        print(name, *(f"{cell.m}: {cell.ratio:.2f}" for cell in found if cell.rule == name))
    return found


def table(found: Sequence[Cell]) -> str:
    """Write one line per rule: our microseconds, and how many times longer TorchJD takes."""
    sizes = list(dict.fromkeys((cell.m, cell.n) for cell in found))
    head = ["rule", *(f"{m} x {n}" for m, n in sizes), "residual, ours / theirs"]
    lines = [head]
    for name in dict.fromkeys(cell.rule for cell in found):
        row = {(cell.m, cell.n): cell for cell in found if cell.rule == name}
        line = [name]
        line += [f"{row[s].ours:.0f} ({row[s].ratio:.2f})" if s in row else "" for s in sizes]
        pairs = [cell.residual for cell in row.values() if cell.residual is not None]
        line.append(" / ".join(f"{max(side):.0e}" for side in zip(*pairs, strict=True)))
        lines.append(line)
    return markdown_table(lines, code=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--tasks", nargs="+", type=int, default=TASKS)
    parser.add_argument("--seconds", type=float, default=0.2, help="for each side of a cell")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = cells(given.rules, given.tasks, given.seconds, given.rounds)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}, one thread"
    print(f"\nMicroseconds of gradbal (times longer: TorchJD), float32, {versions}\n")
    print(table(found))
    if given.out:
        given.out.write_text(json.dumps([asdict(cell) for cell in found], indent=1) + "\n")


if __name__ == "__main__":
    main()
