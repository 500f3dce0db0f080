"""The whole comparison: tasks alone, fixed weights and rules, all tuned alike."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from statistics import fmean
from typing import NamedTuple

import torch

from gradbal.lab.compare.cost import Cost, CostCell, measure
from gradbal.lab.compare.settings import OWNER, Settings
from gradbal.lab.training import resume
from gradbal.lab.training.loop import ALONE, Cell, Record, train

FIXED = "constant"  # the rule that takes weights


class Method(NamedTuple):
    """Who is compared.

    Attributes:
        arch: An architecture, or ``ALONE``.
        rule: A registered rule; the task's name for a task alone.
        weights: Fixed weights for the rule ``constant``; else none.
    """

    arch: str
    rule: str
    weights: tuple[float, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether it is a sum with fixed weights; the plain sum is one."""
        return self.rule in ("ew", FIXED)


class Trained(NamedTuple):
    """What became of a method.

    Attributes:
        lr: The learning rate that was best on validation.
        runs: How many runs chose it.
        records: Of the best learning rate, by seed.
    """

    lr: float
    runs: int
    records: dict[int, Record]

    @property
    def score(self) -> float:
        """Mean over seeds of how good it is on validation, lower is better."""
        return fmean(record.score for record in self.records.values())


class Outcome(NamedTuple):
    """Everything that was trained and measured.

    Attributes:
        alone: The tasks by themselves.
        methods: The others.
        costs: What a step takes, by architecture and rule.
        failures: What could not be trained or measured, and why.
    """

    alone: dict[Method, Trained]
    methods: dict[Method, Trained]
    costs: dict[tuple[str, str], Cost]
    failures: dict[str, str]


class Contest:
    """Trains what is not yet in the output folder.

    Args:
        settings: What users may set.
        quiet: Show no progress.
    """

    def __init__(self, settings: Settings, *, quiet: bool = False) -> None:
        self.settings, self.quiet = settings, quiet
        self.data = settings.prepare()
        self.failures: dict[str, str] = {}

    def run(self) -> Outcome:
        """Train everyone, and measure what a step takes.

        Raises:
            ValueError: If a task alone cannot be trained: then there is nothing to compare with.
        """
        tasks = self.data.tasks
        alone = self.tuned([Method(ALONE, task) for task in tasks], {})
        against = {
            seed: tuple(
                trained.records[seed].validation[method.rule][tasks[method.rule].select]
                for method, trained in alone.items()
            )
            for seed in range(self.settings.seeds)
        }
        scores = [trained.score for trained in alone.values()]
        if len(alone) < len(tasks) or {0, inf} & {*scores}:
            raise ValueError(
                f"{OWNER}: every task must be learned alone, to compare with; "
                f"{self.failures or 'a figure on validation is 0 or not finite'}."
            )
        methods = self.tuned(self.methods(), against)
        costs = self.measured([*dict.fromkeys((m.arch, m.rule) for m in methods)])
        return Outcome(alone, methods, costs, self.failures)

    def methods(self) -> list[Method]:
        """Return all rules and fixed weights with every architecture."""
        vectors = fixed_weights(len(self.data.tasks), self.settings.front)
        return [
            method
            for arch in self.settings.archs
            for method in (
                *(Method(arch, rule) for rule in self.settings.contestants),
                *(Method(arch, FIXED, weights) for weights in vectors),
            )
        ]

    def tuned(
        self, methods: Sequence[Method], against: Mapping[int, tuple[float, ...]]
    ) -> dict[Method, Trained]:
        """Try all learning rates on the first seeds, then run all seeds with the best one."""
        settings = self.settings
        lrs, first = settings.lrs, range(settings.tuned_on)
        tried = self.trained(
            {(m, lr, s): self.cell(m, lr, s, against) for s in first for m in methods for lr in lrs}
        )
        best = {}
        for method in methods:
            scores = {lr: [tried.get((method, lr, seed)) for seed in first] for lr in lrs}
            means = {lr: fmean(r.score if r else inf for r in some) for lr, some in scores.items()}
            best[method] = min(lrs, key=means.__getitem__)
        all_seeds = range(settings.seeds)
        done = self.trained(
            {(m, lr, s): self.cell(m, lr, s, against) for s in all_seeds for m, lr in best.items()}
        )
        found = {
            m: {s: done[m, lr, s] for s in all_seeds if (m, lr, s) in done}
            for m, lr in best.items()
        }
        runs = len(lrs) * len(first)
        return {
            m: Trained(best[m], runs, records)
            for m, records in found.items()
            if len(records) == settings.seeds
        }

    def cell(
        self, method: Method, lr: float, seed: int, against: Mapping[int, tuple[float, ...]]
    ) -> Cell:
        """Return a run in full."""
        settings = self.settings
        return Cell(
            problem=settings.subject,
            arch=method.arch,
            rule=method.rule,
            weights=method.weights,
            optimizer=settings.optimizer,
            lr=lr,
            batch=settings.batch or self.data.batch,
            epochs=settings.epochs,
            patience=settings.patience,
            seed=seed,
            against=against.get(seed, ()),
            device=settings.device,
        )

    def trained(
        self, wanted: Mapping[tuple[Method, float, int], Cell]
    ) -> dict[tuple[Method, float, int], Record]:
        """Train what the folder does not hold."""
        settings = self.settings
        records, failures = resume.run(
            [*wanted.values()],
            settings.out / "runs.jsonl",
            partial(train, settings.load),
            Record,
            jobs=settings.jobs,
            quiet=self.quiet,
        )
        self.failures |= {str(cell): why for cell, why in failures.items()}
        return {key: records[cell] for key, cell in wanted.items() if cell in records}

    def measured(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Cost]:
        """Measure what a step takes, one by one."""
        settings = self.settings
        cells = {
            (arch, rule): CostCell(
                settings.subject,
                arch,
                rule,
                settings.optimizer,
                settings.batch or self.data.batch,
                settings.device,
            )
            for arch, rule in pairs
        }
        costs, failures = resume.run(
            [*cells.values()],
            settings.out / "costs.jsonl",
            partial(measure, settings),
            Cost,
            quiet=self.quiet,
        )
        self.failures |= {str(cell): why for cell, why in failures.items()}
        return {pair: costs[cell] for pair, cell in cells.items() if cell in costs}


def fixed_weights(n_tasks: int, n: int) -> list[tuple[float, ...]]:
    """Return vectors of fixed weights beside the equal ones, each with the sum ``n_tasks``.

    Args:
        n_tasks: Number of tasks.
        n: How many; for two tasks they are evenly spaced, else drawn evenly from the simplex, the
            same ones every time.

    Example:
        >>> fixed_weights(2, 4)
        [(0.4, 1.6), (0.8, 1.2), (1.2, 0.8), (1.6, 0.4)]
    """
    if n_tasks == 2:
        shares = [i / (n + 1) for i in range(1, n + 1)]
        return [(round(2 * s, 6), round(2 - 2 * s, 6)) for s in shares if s != 0.5]
    draw = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, n_tasks, generator=draw, dtype=torch.float64)
    heights = -uniform.clamp(min=1e-12).log()  # exponential: their shares are even on the simplex
    drawn = n_tasks * heights / heights.sum(dim=1, keepdim=True)
    return [tuple(round(weight, 6) for weight in row) for row in drawn.tolist()]
