"""What came of the controls: tables, a verdict and a picture."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.automtl_controls import (
    SHARED,
    SHUFFLED,
    SKIPPING,
    SPLIT,
    TRIED,
    WEIGHTS,
    effective,
)
from benchmarks.automtl_networks import AFFINITY, COSTS, NEAR, PERMUTED, WIDE, Record, Rows
from benchmarks.automtl_report import FOUND, Results
from gradbal._utils.tables import markdown_table
from gradbal.diagnostics.plots import MARKS, new_figure, tidy
from gradbal.lab.compare.tables import made_by
from gradbal.lab.training.intervals import Paired
from gradbal.lab.training.loop import ALONE, Tasks
from gradbal.lab.training.summary import main_delta_m, main_figures

CHOSEN = "split chosen on validation"
FITTING = "split at most as large, chosen on validation"  # as AutoMTL's network
GROUPS = {SHUFFLED: "shuffled policies", SKIPPING: "random policies with equal skips"}
BETTER = (FOUND, COSTS, AFFINITY)  # which might beat a split
LETTERS = "sc-"  # of the branches: shared, a copy, skipped


class Study:
    """The records of one problem and rule: networks that were trained, and searches.

    Args:
        records: All there are, of which those are taken.
        problem: Its name.
        rule: Its name.
        tasks: The tasks of the problem.
    """

    def __init__(self, records: Sequence[Record], problem: str, rule: str, tasks: Tasks) -> None:
        trained = [record for record in records if record.cell.epochs]
        self.results = Results(trained, problem, rule, tasks, GROUPS)
        self.tasks = tasks
        self.searches: dict[str, dict[int, Record]] = {method: {} for method in TRIED}
        for record in records:
            cell = record.cell
            if not cell.epochs and (cell.problem, cell.rule) == (problem, rule):
                self.searches[cell.method][cell.seed] = record
        found = self.results.found
        splits = {method: found[method] for method in found if method.startswith(SPLIT)}
        self.splits = tuple(splits)
        found[CHOSEN], found[FITTING] = {}, {}
        for seed, (ours,) in found[FOUND].items():
            tried = [records[seed][0] for records in splits.values()]
            most = (1 + NEAR) * ours.parameters
            fitting = [record for record in tried if record.parameters <= most]
            found[CHOSEN][seed] = [min(tried, key=self._chosen_by)]
            found[FITTING][seed] = [min(fitting, key=self._chosen_by)]

    def policies(self, method: str) -> dict[int, Rows]:
        """Return what a search found, by seed, with lone shared operators as copies."""
        return {
            seed: effective(tuple(tuple(record.policy[task]) for task in self.tasks))
            for seed, record in self.searches[method].items()
        }

    def sharing(self, method: str) -> float:
        """Return the mean share of operators that a task shares with another."""
        rows = [row for rows in self._rows(method) for row in rows]
        return fmean(row.count(SHARED) / len(row) for row in rows)

    def nominal(self, method: str) -> float:
        """Return the mean share of operators that a search calls shared."""
        rows = [r for record in self.searches[method].values() for r in record.policy.values()]
        return fmean(row.count(SHARED) / len(row) for row in rows)

    def split_of(self, rows: Rows) -> int | None:
        """Return where a policy splits the network; None if it does so nowhere or differently."""
        for number, method in enumerate(self.splits):
            if next(self._rows(method)) == rows:
                return number
        return None

    def _rows(self, method: str) -> Iterator[Rows]:
        for records in self.results.found[method].values():
            for record in records:
                yield record.cell.policy

    def _chosen_by(self, record: Record) -> float:
        against = dict(zip(self.tasks, record.cell.against, strict=True))
        return main_delta_m(main_figures(record.validation, self.tasks), against, self.tasks)


def page(
    records: Mapping[Any, Record],
    problems: Mapping[str, Tasks],
    options: argparse.Namespace,
    command: str,
) -> str:
    """Write the page, and draw its picture beside."""
    head = f"# AutoMTL: controls\n\n{made_by(command, 'torch', 'scikit-learn')}"
    parts = [head, explanation(options)]
    picture = options.out.with_suffix(".png")
    studies = {
        (name, rule): Study([*records.values()], name, rule, tasks)
        for name, tasks in problems.items()
        for rule in options.rules
    }
    draw(studies, picture)
    for (name, rule), study in studies.items():
        parts += [f"## {name}, `{rule}`", verdict(study), table(study)]
        parts += ["### What the searches found", policies(study), stability(study)]
    parts.append(f"![Delta_m against the number of parameters]({picture.name})")
    return "\n\n".join(parts) + "\n"


def explanation(options: argparse.Namespace) -> str:
    """Write what was done."""
    return f"""\
What does a search add to a network that is split by hand? All networks are trained alike, as on
[the other page](automtl.md): {options.epochs} epochs of Adam from the same weights; the epoch is
chosen on validation examples, and test examples are used once. A policy that several methods
propose is trained once for each seed.

- **split at k**: all tasks share the first k operators and have copies of the others. There is no
  search; the last split is hard sharing. Two lines choose k by the validation figures, for each
  seed: among all, and among networks that are at most as large as AutoMTL's, within 3 %.
- **{WIDE}**: hard sharing, with all channels widened to the number of parameters of AutoMTL's
  network.
- **AutoMTL**: the search with the published regulariser, `policy_weight` 0.01; then with other
  weights.
- **shuffled policies**: each task has AutoMTL's branches at other operators, by chance; mean of
  {options.policies}.
- **random policies with equal skips**: each task skips as often as in AutoMTL's policy and shares
  the rest by chance, with as many parameters within 3 %; mean of {options.policies}.
- **permuted labels**: the search sees labels that were permuted among the training examples, so it
  learns nothing of how the tasks relate. What it finds is trained on the true labels.
- **expected parameters**: another search, without skips, whose regulariser is the expected number
  of parameters. Its weight, 0.3 of 0.03, 0.1, 0.3, 1 and 3, gave the size nearest to AutoMTL's on
  seed 9.
- **affinity start**: the search starts from logits that favour sharing where the gradients of the
  tasks agree more than in the mean of all operators, measured while everything is shared. The
  factor of the cosines is 5, tuned for nothing.

An operator counts as shared for a task if another task shares it: one that a task alone calls
shared is its own copy. Delta_m is the mean change for the worse against each task alone with the
same seed, in percent: lower is better. ± is Student's 95 % interval over {len(options.seeds)}
seeds, not corrected for how many there are; bold where it leaves out zero."""


def verdict(study: Study) -> str:
    """Say whether a search beats the split, and whether AutoMTL's depends on the labels."""
    deltas = study.results.deltas
    less = {
        split: {method: Paired.of(deltas(method), deltas(split)).less for method in BETTER}
        for split in (FITTING, CHOSEN)
    }
    wins = [method for method, some in less[FITTING].items() if some.clear and some.mean < 0]
    said = f"Beyond the noise, {' and '.join(wins)} beat" if wins else "No search beats"
    fitting, chosen = (
        ", ".join(f"{method} {interval.shown('+.1f')}" for method, interval in some.items())
        for some in less.values()
    )
    found, blind = study.policies(FOUND), study.policies(PERMUTED)
    split = sum(study.split_of(rows) is not None for rows in found.values())
    equal = sum(rows == blind[seed] for seed, rows in found.items())
    noise = "" if wins else ", beyond the noise"
    return (
        f"**{said} a {FITTING}{noise}.** Delta_m less that of this split: {fitting}; less that of "
        f"the split chosen among all sizes: {chosen}. In {split} of {len(found)} seeds AutoMTL's "
        f"network is itself a split, and in {equal} the search finds the same network from "
        "permuted labels."
    )


def table(study: Study) -> str:
    """Write one line per network."""
    results = study.results
    lines = [[*results.head(), "shared", f"{FOUND} less this"]]
    for method in order(study):
        policy = method not in (ALONE, WIDE)
        shared = f"{100 * study.sharing(method):.0f} %" if policy else ""
        lines.append([*results.line(method), shared, results.found_less(method)])
    return markdown_table(lines)


def order(study: Study) -> list[str]:
    """Return the networks in the order of the table."""
    searched = [method for method in TRIED if method != FOUND]
    return [ALONE, *study.splits, CHOSEN, FITTING, WIDE, FOUND, *GROUPS.values(), *searched]


def policies(study: Study) -> str:
    """Write what each search found on each seed, and what it took."""
    seeds = [*study.results.alone]
    head = ["search", *(f"seed {seed}" for seed in seeds), "called shared", "shared", "seconds"]
    lines = [head]
    for method in TRIED:
        found = study.policies(method)
        lines.append(
            [
                method,
                *(described(study, found[seed]) for seed in seeds),
                f"{100 * study.nominal(method):.0f} %",
                f"{100 * study.sharing(method):.0f} %",
                f"{fmean(r.search_s for r in study.searches[method].values()):.0f}",
            ]
        )
    tasks = " / ".join(study.tasks)
    return (
        f"{markdown_table(lines)}\n\nPolicies that are no split are written operator by operator, "
        f"{tasks}: s shared, c a copy, - skipped. Seconds are of one processor."
    )


def described(study: Study, rows: Rows) -> str:
    """Write a policy as a split, or by one letter per operator and task."""
    split = study.split_of(rows)
    if split is not None:
        return f"{SPLIT}{split}"
    return "`" + " / ".join("".join(LETTERS[branch] for branch in row) for row in rows) + "`"


def stability(study: Study) -> str:
    """Say how alike policies are: over seeds, and to those of other searches on the same seed."""
    found = study.policies(FOUND)
    lines = [["AutoMTL's sharing and that of", "Jaccard index"]]
    over = [alike(one, other) for one, other in combinations(found.values(), 2)]
    lines.append(["AutoMTL on another seed", f"{fmean(over):.2f}"])
    for method in (*WEIGHTS, PERMUTED, COSTS, AFFINITY):
        other = study.policies(method)
        lines.append([method, f"{fmean(alike(found[s], other[s]) for s in found):.2f}"])
    for name in GROUPS.values():
        drawn = study.results.found[name]
        index = fmean(alike(found[s], r.cell.policy) for s in found for r in drawn[s])
        lines.append([name, f"{index:.2f}"])
    return (
        f"{markdown_table(lines)}\n\nThe index compares which pairs of tasks share which "
        "operators: the number of pairs and operators that both policies share, divided by the "
        "number that at least one shares, and 1 if none shares any. Both policies are of one seed, "
        "except in the first line."
    )


def alike(one: Rows, other: Rows) -> float:
    """Return the Jaccard index of what pairs of tasks share in two policies."""
    first, second = _pairs(one), _pairs(other)
    return len(first & second) / len(first | second) if first | second else 1.0


def _pairs(rows: Rows) -> set[tuple[int, int, int]]:
    """Return operators and the pairs of tasks that share them."""
    return {
        (number, left, right)
        for number, column in enumerate(zip(*rows, strict=True))
        for left, right in combinations(range(len(rows)), 2)
        if column[left] == column[right] == SHARED
    }


def draw(studies: Mapping[tuple[str, str], Study], path: Path) -> None:
    """Draw Delta_m against the number of parameters, a panel for each problem and rule.

    The splits are joined by a line. Bars are intervals of the difference to AutoMTL: what all
    networks owe to a seed is left out.
    """
    rows, columns = -(-len(studies) // 2), min(2, len(studies))
    figure = new_figure(8 * columns, 5 * rows + 1.5)  # the legend is below
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel, ((name, rule), study) in zip(panels.flat, studies.items(), strict=False):
        results = study.results
        ours = results.deltas(FOUND)
        points = [_place(study, method) for method in study.splits]
        panel.plot(*zip(*points, strict=True), color="0.6", marker=".", label="split at k")
        for number, point in enumerate(points):
            panel.annotate(str(number), point, textcoords="offset points", xytext=(4, 4))
        others = [method for method in order(study) if method not in (ALONE, *study.splits)]
        for mark, method in zip(f"{MARKS}<>", others, strict=True):
            x, y = _place(study, method)
            half = None
            if method != FOUND:
                half = Paired.of(ours, results.deltas(method)).less.half
            panel.errorbar(x, y, half, fmt=mark, color="black", mfc="none", elinewidth=0.6)
            panel.lines[-1].set_label(method)
        panel.axhline(0, color="0.8", linestyle="--", zorder=0)
        panel.set(title=f"{name}, {rule}", xlabel="thousand parameters", ylabel="Delta_m %")
        tidy(panel)
    handles = panels.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)


def _place(study: Study, method: str) -> tuple[float, float]:
    results = study.results
    return results.cost(method, "parameters") / 1e3, fmean(results.deltas(method).values())
