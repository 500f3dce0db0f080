"""The table of all cells in Markdown, and its summaries."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median, stdev

from benchmarks.cells import ALONE, Cell, Record
from benchmarks.problems import problem
from gradbal._utils.tables import markdown_table
from gradbal.lab.compare.tables import Line, made_by
from gradbal.lab.training.summary import main_delta_m

Records = Mapping[Cell, Record]
PACKAGES = ("torch", "scikit-learn")


def heading(command: str) -> str:
    """Write what the table is, how it was made, and on what machine."""
    return f"""# Rules and architectures

{made_by(command, *PACKAGES)}

Scores are those of held-out examples after the last epoch; nothing was selected or tuned, and every
cell had the same number of epochs, the same batches and the same learning rate. Delta_m is the mean
change for the worse against each task alone, in percent: lower is better, and below zero all tasks
together beat one model per task. Figures are means over the seeds, ± their standard deviation; a
seed sets the split, the weights at the start, the batches and the rule. Parameters and step time of
"alone" are sums over the tasks; step times are processor time of one thread. Medians are taken for
each seed, and so are differences, before the mean over the seeds. A cell trains if its summed
training loss falls and every parameter moves, for every seed.
"""


def render(cells: Sequence[Cell], records: Records, *, timed: bool = True) -> str:
    """Write the summaries and the table of each problem.

    Args:
        cells: What was to be trained; every combination of theirs gets a row.
        records: What came out; a cell without record counts as failed.
        timed: Add the time of a step.
    """
    parts = []
    for name in dict.fromkeys(cell.problem for cell in cells):
        table = Table([cell for cell in cells if cell.problem == name], records)
        parts += [
            f"## {name}",
            "Delta_m by rule and architecture:",
            markdown_table(table.matrix()),
            "All cells:",
            markdown_table(table.lines(timed)),
        ]
    return "\n\n".join(parts) + "\n"


class Table:
    """The cells of one problem, pooled over seeds.

    Args:
        cells: The cells.
        records: What came out.
    """

    def __init__(self, cells: Sequence[Cell], records: Records) -> None:
        self.cells, self.records = cells, records
        self.tasks = problem(cells[0].problem, cells[0].seed).tasks
        self.archs = list(dict.fromkeys(cell.arch for cell in cells if cell.arch != ALONE))
        self.rules = list(dict.fromkeys(cell.rule for cell in cells if cell.arch != ALONE))
        self.alone: dict[int, dict[str, float]] = {}
        for record in self._records(lambda cell: cell.arch == ALONE):
            self.alone.setdefault(record.cell.seed, {}).update(record.scores)

    def lines(self, timed: bool) -> list[Line]:
        """Return a line for the tasks alone and one for every rule and architecture."""
        metrics = [f"{name} {task.select}" for name, task in self.tasks.items()]
        lines: list[Line] = [
            ["architecture", "rule", *metrics, "Delta_m %", "parameters"]
            + ["step CPU ms"] * timed
            + ["trains"],
            self._line(ALONE, "", self._records(lambda cell: cell.arch == ALONE), timed),
        ]
        for arch in self.archs:
            for rule in self.rules:
                lines.append(self._line(arch, rule, self._pooled(arch, rule), timed))
        return lines

    def matrix(self) -> list[Line]:
        """Return Delta_m of every rule (down) and architecture (across), with medians of both.

        Medians, because one architecture that fails would rule a mean. The differences to the
        first rule and the first architecture are taken seed by seed.
        """
        cells = {(a, r): self._delta_by_seed(a, r) for a in self.archs for r in self.rules}
        rows = {r: _median([cells[a, r] for a in self.archs]) for r in self.rules}
        columns = {a: _median([cells[a, r] for r in self.rules]) for a in self.archs}
        everything = _median([*cells.values()])
        first_rule, first_arch = self.rules[0], self.archs[0]
        lines: list[Line] = [["rule", *self.archs, "median", f"median less {first_rule}"]]
        for rule, middle in rows.items():
            line = [_spread(cells[arch, rule].values()) for arch in self.archs]
            less = _spread(_less(middle, rows[first_rule]))
            lines.append([rule, *line, _spread(middle.values()), less])
        middles = [_spread(middle.values()) for middle in [*columns.values(), everything]]
        less_first = [_spread(_less(middle, columns[first_arch])) for middle in columns.values()]
        return [
            *lines,
            ["median", *middles, ""],
            [f"median less {first_arch}", *less_first, "", ""],
        ]

    def _line(self, arch: str, rule: str, pooled: Sequence[Record], timed: bool) -> Line:
        scores = [
            _spread((r.scores[name] for r in pooled if name in r.scores), 3) for name in self.tasks
        ]
        delta = "0" if arch == ALONE else _spread(self._deltas(pooled))
        by_rule: dict[str, list[Record]] = {}  # alone, there is one model per task
        for record in pooled:
            by_rule.setdefault(record.cell.rule, []).append(record)
        params = sum(some[0].params for some in by_rule.values())
        time = sum(fmean(record.step_ms for record in some) for some in by_rule.values())
        trains = "yes" if pooled and not any(record.complaint for record in pooled) else "NO"
        return [arch, rule, *scores, delta, str(params), *[f"{time:.1f}"] * timed, trains]

    def _deltas(self, pooled: Iterable[Record]) -> list[float]:
        return [
            main_delta_m(record.scores, self.alone[record.cell.seed], self.tasks)
            for record in pooled
            if self.alone.get(record.cell.seed, {}).keys() == self.tasks.keys()
        ]

    def _delta_by_seed(self, arch: str, rule: str) -> dict[int, float]:
        found = self._pooled(arch, rule)
        return {r.cell.seed: delta for r in found for delta in self._deltas([r])}

    def _pooled(self, arch: str, rule: str) -> list[Record]:
        return self._records(lambda cell: (cell.arch, cell.rule) == (arch, rule))

    def _records(self, wanted: Callable[[Cell], bool]) -> list[Record]:
        return [self.records[c] for c in self.cells if wanted(c) and c in self.records]


def _median(cells: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the median over cells for each seed that all of them have."""
    seeds = [seed for seed in cells[0] if all(seed in cell for cell in cells)]
    return {seed: median(cell[seed] for cell in cells) for seed in seeds}


def _less(values: Mapping[int, float], first: Mapping[int, float]) -> list[float]:
    return [value - first[seed] for seed, value in values.items() if seed in first]


def _spread(values: Iterable[float], digits: int = 1) -> str:
    """Write the mean and, over several seeds, the standard deviation."""
    some = list(values)
    if not some:
        return "-"
    spread = f" ± {stdev(some):.{digits}f}" if len(some) > 1 else ""
    return f"{fmean(some):.{digits}f}{spread}"
