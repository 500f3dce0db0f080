"""What a comparison found, as Markdown, JSON and pictures."""

import json
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from gradbal._utils.tables import markdown_table
from gradbal.lab.compare import pictures
from gradbal.lab.compare.contest import Method, Outcome
from gradbal.lab.compare.rows import Row, Standing, alone_of, standings
from gradbal.lab.compare.settings import Settings
from gradbal.lab.compare.tables import Line, made_by
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training.intervals import LEVEL, Interval

COLUMNS = 6  # figures that have a column each; of more, means over the tasks


class Report:
    """Sums a comparison up.

    Args:
        settings: What users may set.
        data: The problem of the first seed.
        outcome: What was trained and measured.
    """

    def __init__(self, settings: Settings, data: Problem, outcome: Outcome) -> None:
        self.settings, self.data, self.outcome = settings, data, outcome
        self.higher = {name: task.higher for name, task in data.tasks.items()}
        self.standings = standings(outcome, self.higher)
        self.alone = alone_of(outcome)

    # ------------------------------------------------------------------ the table

    def lines(self, *, costs: bool = True) -> list[Line]:
        """Return the table of all architectures, its head first.

        Args:
            costs: Show what a step takes; it is never measured the same twice.
        """
        head = ["architecture", "method", "lr", "runs", *self._titles(), "Delta_m %", "Delta_p %"]
        head += ["mean rank", "less best fixed", "p", "epochs"]
        runs = sum(trained.runs for trained in self.outcome.alone.values())
        figures = self._figures([*self.alone.values()])
        lines = [["", "tasks alone", "", str(runs), *figures, "0", "0", *[""] * 4]]
        for arch, standing in self.standings.items():
            lines += [[arch, *self._line(row, standing)] for row in standing.pool]
        if costs:
            rows = [row for standing in self.standings.values() for row in standing.pool]
            head += ["step / plain sum", "step ms", "peak MB", "passes"]
            lines = [
                [*lines[0], *[""] * 4],
                *(a + _cost(b) for a, b in zip(lines[1:], rows, strict=True)),
            ]
        return [head, *lines]

    def _line(self, row: Row, standing: Standing) -> list[str]:
        changes, gains = (Interval.of([*d.values()]).shown(".2f") for d in (row.changes, row.gains))
        less, p = "", ""
        if row.paired is not None:
            less = row.paired.less.shown("+.2f")
            p = "" if isnan(row.paired.p) else f"{row.paired.p:.2g}"
            less = f"**{less}**" if row.clear else less
        runs = row.trained.runs
        if row is standing.best:  # chosen among all fixed weights
            runs *= sum(other.method.fixed for other in standing.rows)
        return [
            f"{_name(row.method)}{' (best fixed)' if row is standing.best else ''}",
            f"{row.trained.lr:g}",
            str(runs),
            *self._figures([*row.tests.values()]),
            changes,
            gains,
            f"{row.rank:.1f}",
            less,
            p,
            f"{row.epoch:.0f}",
        ]

    def _titles(self) -> list[str]:
        names = [(task, name) for task, some in self.higher.items() for name in some]
        if len(names) <= COLUMNS:
            return [f"{task} {name}" for task, name in names]
        return [f"mean {name}" for name in dict.fromkeys(name for _, name in names)]

    def _figures(self, tests: list[Any]) -> list[str]:  # Scores of every seed
        names = [(task, name) for task, some in self.higher.items() for name in some]
        groups = [[pair] for pair in names]
        if len(names) > COLUMNS:
            kinds = dict.fromkeys(name for _, name in names)
            groups = [[(task, name) for task, name in names if name == kind] for kind in kinds]
        return [
            Interval.of([fmean(scores[t][n] for t, n in group) for scores in tests]).shown(".4g")
            for group in groups
        ]

    # ------------------------------------------------------------------ words and files

    def words(self, *, costs: bool = True) -> str:
        """Return table and notes in Markdown."""
        parts = [
            f"# {self.settings.subject}",
            markdown_table(self.lines(costs=costs)),
            self._notes(),
        ]
        for arch, standing in self.standings.items():
            parts.append(f"{arch}: {_verdict(standing)}")
        if at_an_end := self._at_an_end():
            parts.append(
                "Best at an end of the learning rates tried, so another might be better still: "
                f"{', '.join(at_an_end)}."
            )
        if self.outcome.failures:
            failed = [f"- {name}: {why}" for name, why in self.outcome.failures.items()]
            parts.append("\n".join(["Failed:", "", *failed]))
        return "\n\n".join(parts) + "\n"

    def _notes(self) -> str:
        s = self.settings
        rates = ", ".join(f"{lr:g}" for lr in s.lrs)
        return f"""\
Everyone tried the learning rates {rates} of {s.optimizer} on {s.tuned_on} of {s.seeds} seeds,
at most {s.epochs} epochs, ended after {s.patience} without a better one; `runs` says how many runs
chose. Learning rates, epochs and fixed weights ({s.front} vectors beside the plain sum, all of them
tuned alike) are chosen on validation, by
Delta_m of the tasks' main figures; test examples are used once. ± is Student's 95 % interval over
the seeds. Delta_m is the mean change for the worse against the tasks alone (lower is better),
Delta_p the mean gain over the tasks (higher is better). Ranks are among the rows of the same
architecture. `less best fixed` is Delta_m less that of the best fixed weights, seed by seed, with
the chance p of Student's paired test. It is bold where p, after Holm's correction for all rows
of the architecture, is below {LEVEL}; all else is inside the noise."""

    def _at_an_end(self) -> list[str]:
        """Name those whose learning rate is the lowest or highest of several."""
        named = {f"{method.rule} alone": t for method, t in self.outcome.alone.items()}
        for arch, standing in self.standings.items():
            named |= {f"{arch} {_name(row.method)}": row.trained for row in standing.pool}
        lrs = self.settings.lrs
        ends = {min(lrs), max(lrs)} if len(lrs) > 1 else set()
        return [name for name, trained in named.items() if trained.lr in ends]

    def save(self, command: str) -> list[Path]:
        """Write everything into the output folder.

        Args:
            command: What was run.

        Returns:
            The files.
        """
        out, tasks = self.settings.out, self.data.tasks
        figures = {"time.png": pictures.quality_and_time(self.standings)}
        if len(tasks) == 2:
            for arch, standing in self.standings.items():
                figures[f"front_{arch}.png"] = pictures.front(standing, tasks, self.alone)
        for name, figure in figures.items():
            figure.savefig(out / name, dpi=120)
        made = made_by(command, "torch", device=self.settings.device)
        shown = "\n\n".join(f"![{Path(name).stem}]({name})" for name in figures)
        page, numbers = out / "report.md", out / "report.json"
        page.write_text("\n\n".join([self.words().rstrip(), made, shown]) + "\n", "utf-8")
        numbers.write_text(json.dumps({"made": made, **self.numbers()}, indent=1), "utf-8")
        return [page, numbers, *(out / name for name in figures)]

    def numbers(self) -> dict[str, Any]:
        """Return every method's figures of every seed, for other programs."""
        rows = [row for standing in self.standings.values() for row in standing.rows]
        return {
            "problem": self.settings.subject,
            "alone": self.alone,
            "methods": [
                {
                    **row.method._asdict(),
                    "lr": row.trained.lr,
                    "test": row.tests,
                    "delta_m": row.changes,
                    "delta_p": row.gains,
                    "rank": row.rank,
                    "less_best_fixed": None if row.paired is None else row.paired.less,
                    "p": None if row.paired is None else row.paired.p,
                    "clear": row.clear,
                }
                for row in rows
            ],
            "failures": self.outcome.failures,
        }


def _name(method: Method) -> str:
    if not method.weights:
        return method.rule
    return f"fixed {' '.join(f'{weight:.2g}' for weight in method.weights)}"


def _cost(row: Row) -> list[str]:
    if row.cost is None:
        return ["-"] * 4
    cost = row.cost
    peak = "-" if cost.peak is None else f"{cost.peak / 1e6:.1f}"
    return [f"{cost.ratio:.2f}", f"{1e3 * cost.seconds:.2f}", peak, str(cost.passes)]


def _verdict(standing: Standing) -> str:
    """Say whether any rule beats the best fixed weights."""
    rules = [row for row in standing.pool if not row.method.fixed and row.paired is not None]
    clear = [row for row in rules if row.clear]
    better = [_name(row.method) for row in clear if row.paired and row.paired.less.mean < 0]
    worse = [_name(row.method) for row in clear if row.paired and row.paired.less.mean > 0]
    said = [
        f"{', '.join(better)} better than the best fixed weights"
        if better
        else "no rule is clearly better than the best fixed weights",
        f"{', '.join(worse)} clearly worse" if worse else "none clearly worse",
        f"the other {len(rules) - len(clear)} of {len(rules)} are inside the noise",
    ]
    return "; ".join(said) + "."
