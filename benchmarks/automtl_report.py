"""What came of the search: tables and a picture."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from gradbal._utils.tables import markdown_table
from gradbal.diagnostics.plots import MARKS, new_figure, tidy
from gradbal.lab.compare.tables import made_by
from gradbal.lab.training.intervals import Interval, Paired
from gradbal.lab.training.loop import ALONE, Tasks
from gradbal.lab.training.summary import main_delta_m, main_figures

FOUND, RANDOM = "AutoMTL", "random "
CHANCE = "random policies"  # of equal size, taken together
GROUPS = {RANDOM: CHANCE}
ALIKE = 2  # how many more skips still count as alike
BySeed = dict[int, list[Any]]  # records, of all tasks or all random policies of a seed


class Results:
    """The records of one problem and rule.

    Args:
        records: All there are, of which those are taken.
        problem: Its name.
        rule: Its name.
        tasks: The tasks of the problem.
        groups: Names under which methods count together, by how they begin.
    """

    def __init__(
        self,
        records: Sequence[Any],
        problem: str,
        rule: str,
        tasks: Tasks,
        groups: Mapping[str, str] = GROUPS,
    ) -> None:
        self.tasks = tasks
        self.found: dict[str, BySeed] = {}
        for record in records:
            cell = record.cell
            if cell.problem == problem and (cell.rule == rule or cell.method == ALONE):
                starts = (start for start in groups if cell.method.startswith(start))
                name = groups.get(next(starts, ""), cell.method)
                self.found.setdefault(name, {}).setdefault(cell.seed, []).append(record)
        self.alone = {
            seed: {t: figures for record in some for t, figures in record.test.items()}
            for seed, some in self.found[ALONE].items()
        }

    def deltas(self, method: str) -> dict[int, float]:
        """Return Delta_m of the test figures by seed, the mean over random policies."""
        if method == ALONE:
            return dict.fromkeys(self.alone, 0.0)
        return self._means(method, self._delta)

    def figures(self, method: str, task: str) -> dict[int, float]:
        """Return the figure that the task chooses by, by seed."""
        if method == ALONE:
            return {seed: some[task][self.tasks[task].select] for seed, some in self.alone.items()}
        return self._means(method, lambda r: float(r.test[task][self.tasks[task].select]))

    def cost(self, method: str, of: str) -> float:
        """Return the mean number of parameters or operations; tasks alone count together."""
        some = self.found[method].values()
        total = sum if method == ALONE else fmean
        return fmean(total(getattr(record, of) for record in records) for records in some)

    def head(self) -> list[str]:
        """Return the names of the columns of :meth:`line`."""
        chosen = [f"{name} {task.select}" for name, task in self.tasks.items()]
        return ["network", "Delta_m %", *chosen, "parameters", "operations"]

    def line(self, method: str) -> list[str]:
        """Return the line of a method in a table."""
        figures = (self.figures(method, task).values() for task in self.tasks)
        return [
            "one for each task" if method == ALONE else method,
            "0" if method == ALONE else str(Interval.of([*self.deltas(method).values()])),
            *(Interval.of([*some]).shown(".3f") for some in figures),
            f"{self.cost(method, 'parameters') / 1e3:.1f} k",
            f"{self.cost(method, 'operations') / 1e6:.2f} M",
        ]

    def found_less(self, method: str) -> str:
        """Return AutoMTL's Delta_m less that of another method, bold where it is clear."""
        if method == FOUND:
            return ""
        less = Paired.of(self.deltas(FOUND), self.deltas(method)).less
        text = less.shown("+.1f")
        return f"**{text}**" if less.clear else text

    def _means(self, method: str, value: Callable[[Any], float]) -> dict[int, float]:
        return {s: fmean(map(value, records)) for s, records in self.found[method].items()}

    def _delta(self, record: Any) -> float:
        alone = main_figures(self.alone[record.cell.seed], self.tasks)
        return main_delta_m(main_figures(record.test, self.tasks), alone, self.tasks)


def page(
    records: Mapping[Any, Any],
    problems: Mapping[str, Tasks],
    options: argparse.Namespace,
    command: str,
) -> str:
    """Write the page, and draw its picture beside."""
    parts = [f"# AutoMTL\n\n{made_by(command, 'torch', 'scikit-learn')}", explanation(options)]
    everything = {
        (name, rule): Results([*records.values()], name, rule, tasks)
        for name, tasks in problems.items()
        for rule in options.rules
    }
    picture = options.out.with_suffix(".png")
    draw(everything, picture)
    for (name, rule), results in everything.items():
        parts += [f"## {name}, `{rule}`", table(results), verdict(results), by_skips(results)]
        parts.append(shares(results))
    parts.append(f"![Delta_m against the number of parameters]({picture.name})")
    return "\n\n".join(parts) + "\n"


def explanation(options: argparse.Namespace) -> str:
    """Write what was done."""
    return f"""\
Every network is trained for {options.epochs} epochs by Adam with one learning rate, tuned for none;
the epoch is chosen on validation examples, and test examples are used once. That of AutoMTL starts
anew after the search, so it takes as many steps as the others; the search comes on top. A random
policy draws the branch of every operator and task by chance, among policies whose network has the
parameters of the one that AutoMTL found within 3 %; there are {options.policies} for each seed and
rule, of which the mean counts. They start from the weights that AutoMTL's network starts from, the
other methods from weights drawn alike. Where they choose other branches than AutoMTL, which stands
below each table, a difference may be one of how much is skipped, not of where. So random policies
are the least that a search must beat; [the controls](automtl_controls.md) compare it with networks
that are split by hand, with random policies that skip as often, and with a search on permuted
labels.

Delta_m is the mean change for the worse against each task alone with the same seed, in percent:
lower is better. ± is Student's 95 % interval over {len(options.seeds)} seeds; the last column is
AutoMTL's Delta_m less that of the line, seed by seed, bold where the interval leaves out zero.
Intervals are not corrected for how many there are."""


def table(results: Results) -> str:
    """Write one line per method."""
    lines = [[*results.head(), f"{FOUND} less this"]]
    lines += [[*results.line(method), results.found_less(method)] for method in results.found]
    return markdown_table(lines)


def verdict(results: Results) -> str:
    """Say how AutoMTL stands against chance."""
    found, chance = results.deltas(FOUND), results.deltas(CHANCE)
    paired = Paired.of(found, chance)
    better = paired.less.mean < 0
    words = (
        f"AutoMTL {'beats' if better else 'is worse than'} random policies of equal size"
        if paired.less.clear
        else "AutoMTL and random policies of equal size do not differ beyond the noise"
    )
    beaten = [
        results._delta(record) > found[seed]
        for seed, some in results.found[CHANCE].items()
        for record in some
    ]
    theirs, ours = (_skipped(results.found[method]) for method in (CHANCE, FOUND))
    return (
        f"{words}: {paired.less.shown('+.1f')} (p = {paired.p:.2g}). "
        f"It is better than {sum(beaten)} of {len(beaten)} of them. Of the operators, random "
        f"policies skip {100 * theirs:.0f} % and AutoMTL {100 * ours:.0f} %."
    )


def by_skips(results: Results) -> str:
    """Say how much of the difference to chance goes with what random policies skip."""
    groups: dict[bool, list[float]] = {True: [], False: []}
    for seed, some in results.found[CHANCE].items():
        (found,) = results.found[FOUND][seed]
        for record in some:
            alike = _skips(record) <= _skips(found) + ALIKE
            groups[alike].append(results._delta(found) - results._delta(record))
    alike, others = (
        f"{fmean(some):+.1f} over {len(some)}" if some else "none" for some in groups.values()
    )
    return (
        "Looked at afterwards, so no test: AutoMTL's Delta_m less that of a random policy is "
        f"{alike} policies that skip at most {ALIKE} times more than it, and {others} that skip "
        "more often."
    )


def _skipped(some: BySeed) -> float:
    """Return the share of operators that policies skip."""
    policies = [record.policy for record in chain.from_iterable(some.values())]
    branches = [branch for policy in policies for rows in policy.values() for branch in rows]
    return branches.count(2) / len(branches)


def _skips(record: Any) -> int:
    return sum(branches.count(2) for branches in record.policy.values())


def shares(results: Results) -> str:
    """Say what the policies chose, and what the search took."""
    lines = [["policies", "shared", "specific", "skip"]]
    for method, some in results.found.items():
        records = [*chain.from_iterable(some.values())]
        branches = [b for r in records for rows in r.policy.values() for b in rows]
        if branches:
            lines.append(
                [method, *(f"{100 * branches.count(i) / len(branches):.0f} %" for i in range(3))]
            )
    seconds = fmean(r.search_s for some in results.found[FOUND].values() for r in some)
    return f"{markdown_table(lines)}\n\nA search took {seconds:.0f} s of processor time."


def draw(everything: Mapping[tuple[str, str], Results], path: Path) -> None:
    """Draw Delta_m against the number of parameters, a panel for each problem and rule.

    Bars are intervals of the difference to AutoMTL: what all methods owe to a seed is left out.
    """
    figure = new_figure(6.5 * min(2, len(everything)), 4.5 * -(-len(everything) // 2))
    panels = figure.subplots(-(-len(everything) // 2), min(2, len(everything)), squeeze=False)
    for panel, ((name, rule), results) in zip(panels.flat, everything.items(), strict=False):
        ours = results.deltas(FOUND)
        for mark, method in zip(MARKS, results.found, strict=False):
            deltas = dict.fromkeys(ours, 0.0) if method == ALONE else results.deltas(method)
            half = None if method == FOUND else Paired.of(ours, deltas).less.half
            x, y = results.cost(method, "parameters") / 1e3, fmean(deltas.values())
            panel.errorbar(x, y, half, fmt=mark, color="black", mfc="none", elinewidth=0.6)
            panel.lines[-1].set_label("one for each task" if method == ALONE else method)
        panel.axhline(0, color="0.8", linestyle="--", zorder=0)
        panel.set(title=f"{name}, {rule}", xlabel="thousand parameters", ylabel="Delta_m %")
        tidy(panel)
    handles = panels.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=100)
