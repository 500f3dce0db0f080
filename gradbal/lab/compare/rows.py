"""Every method's figures over the seeds, and how it stands to the best fixed weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from gradbal.lab.compare.contest import Method, Outcome, Trained
from gradbal.lab.compare.cost import Cost
from gradbal.lab.training.intervals import LEVEL, Interval, Paired, holm
from gradbal.lab.training.summary import Higher, Scores, delta_m, delta_p, mean_rank


@dataclass
class Row:
    """A method.

    Attributes:
        method: Which one.
        trained: What became of it.
        tests: Figures on the test examples, by seed, task and name.
        changes: Delta_m in percent, by seed; lower is better.
        gains: Delta_p in percent, by seed; higher is better.
        cost: Of a step; None if it was not measured.
        rank: Mean rank in the pool; None outside of it.
        paired: Delta_m less that of the best fixed weights; None for these and outside the pool.
        clear: Whether this difference is more than noise, with Holm's correction for the pool.
    """

    method: Method
    trained: Trained
    tests: dict[int, Scores]
    changes: dict[int, float]
    gains: dict[int, float]
    cost: Cost | None
    rank: float | None = None
    paired: Paired | None = None
    clear: bool = False

    def interval(self, task: str, name: str) -> Interval:
        """Return a figure over the seeds."""
        return Interval.of([scores[task][name] for scores in self.tests.values()])

    def relative(
        self, task: str, name: str, alone: Mapping[int, Scores], higher: Higher
    ) -> Interval:
        """Return by how many percent a figure is worse than that of the task alone."""
        changes = [
            delta_m({task: scores[task]}, {task: {name: alone[seed][task][name]}}, higher)
            for seed, scores in self.tests.items()
        ]
        return Interval.of(changes)

    @property
    def epoch(self) -> float:
        """The best epoch, mean over seeds."""
        return fmean(record.epoch for record in self.trained.records.values())

    @property
    def steps(self) -> float:
        """Steps until the best epoch, mean over seeds."""
        return fmean(record.steps for record in self.trained.records.values())


@dataclass
class Standing:
    """All methods with one architecture.

    Attributes:
        rows: All of them, the plain sum first, fixed weights last.
        best: The fixed weights that are best on validation; the plain sum is among them.
        pool: Those that are ranked and compared: the rules, and the best fixed weights.
    """

    rows: list[Row]
    best: Row
    pool: list[Row]

    def times(self) -> list[tuple[Row, float]]:
        """Return for the pool the seconds until the best epoch, validation left out.

        Ratios to the plain sum were taken in turn with it. They are multiplied by one time of the
        plain sum's step, the median of all, so that a busy moment does not shift a method.
        """
        timed = [(row, row.cost) for row in self.pool if row.cost is not None]
        plain = median(cost.seconds / cost.ratio for _, cost in timed) if timed else 0.0
        return [(row, row.steps * cost.ratio * plain) for row, cost in timed]


def alone_of(outcome: Outcome) -> dict[int, Scores]:
    """Return the test figures of the tasks alone, by seed."""
    joined: dict[int, dict[str, Mapping[str, float]]] = {}
    for trained in outcome.alone.values():
        for seed, record in trained.records.items():
            joined.setdefault(seed, {}).update(record.test)
    return {**joined}


def standings(outcome: Outcome, higher: Higher) -> dict[str, Standing]:
    """Sum all methods up, by architecture.

    Args:
        outcome: What was trained.
        higher: As the tasks say it.
    """
    alone = alone_of(outcome)
    by_arch: dict[str, list[Row]] = {}
    for method, trained in outcome.methods.items():
        tests: dict[int, Scores] = {seed: record.test for seed, record in trained.records.items()}
        row = Row(
            method,
            trained,
            tests,
            {seed: delta_m(found, alone[seed], higher) for seed, found in tests.items()},
            {seed: delta_p(found, alone[seed], higher) for seed, found in tests.items()},
            outcome.costs.get((method.arch, method.rule)),
        )
        by_arch.setdefault(method.arch, []).append(row)
    return {arch: _standing(rows, higher) for arch, rows in by_arch.items()}


def _standing(rows: Sequence[Row], higher: Higher) -> Standing:
    best = min((row for row in rows if row.method.fixed), key=lambda row: row.trained.score)
    pool = [row for row in rows if not row.method.weights or row is best]
    ranks = mean_rank({str(i): _means(row, higher) for i, row in enumerate(pool)}, higher)
    for i, row in enumerate(pool):
        row.rank = ranks[str(i)]
        if row is not best:
            row.paired = Paired.of(row.changes, best.changes)
    chances = {str(i): row.paired.p for i, row in enumerate(pool) if row.paired is not None}
    for name, chance in holm(chances).items():
        pool[int(name)].clear = chance < LEVEL
    return Standing([*rows], best, pool)


def _means(row: Row, higher: Higher) -> Scores:
    return {t: {name: row.interval(t, name).mean for name in some} for t, some in higher.items()}
