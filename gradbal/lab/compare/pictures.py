"""The pictures of a comparison; marks and names differ, so grey paper will do."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from gradbal.diagnostics.plots import MARKS, new_figure, tidy
from gradbal.lab.compare.rows import Row, Standing
from gradbal.lab.problems.problem import Task
from gradbal.lab.training.intervals import Interval
from gradbal.lab.training.summary import Scores

LOOKS = [{"marker": mark, "mfc": fill} for fill, mark in product(("none", "black", "0.7"), MARKS)]
# intervals step back behind the means
BARS = {"ecolor": "0.6", "elinewidth": 0.6, "linestyle": "none"}


def front(standing: Standing, tasks: Mapping[str, Task], alone: Mapping[int, Scores]) -> Any:
    """Draw two tasks against each other: fixed weights as a line, the rules on top.

    Changes against the tasks alone are taken seed by seed, so that what all methods owe to a seed
    does not blur them.

    Args:
        standing: All methods with one architecture.
        tasks: Both tasks.
        alone: Figures of the tasks alone, by seed.

    Returns:
        The matplotlib figure.
    """
    higher = {name: task.higher for name, task in tasks.items()}
    axes = [(name, task.select) for name, task in tasks.items()]
    places = {
        id(row): [row.relative(*axis, alone, higher) for axis in axes] for row in standing.rows
    }
    figure = new_figure(7, 6)
    panel = figure.subplots()
    weighted = [row for row in standing.rows if row.method.fixed]
    weighted.sort(key=_share)
    line = [[places[id(row)][i].mean for row in weighted] for i in range(2)]
    panel.plot(*line, "o-", color="0.6", label="fixed weights (the first task's)")
    for row, x, y in zip(weighted, *line, strict=True):
        panel.annotate(f"{_share(row):.2g}", (x, y), xytext=(4, 4), textcoords="offset points")
    rules = [row for row in standing.pool if not row.method.fixed]
    for row, look in zip(rules, LOOKS, strict=False):
        (x, dx), (y, dy) = places[id(row)]
        panel.errorbar(x, y, dy, dx, color="black", label=row.method.rule, **look, **BARS)
    panel.axvline(0, color="0.8", linestyle="--", zorder=0)
    panel.axhline(0, color="0.8", linestyle="--", zorder=0)
    labels = [f"{task} {name}, % worse than alone" for task, name in axes]
    panel.set(xlabel=labels[0], ylabel=labels[1], title="test figures, means and 95 % over seeds")
    tidy(panel)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def _share(row: Row) -> float:
    return (row.method.weights or (1.0, 1.0))[0]


def quality_and_time(standings: Mapping[str, Standing]) -> Any:
    """Draw Delta_m against the time until the epoch that validation chose.

    Args:
        standings: All methods, by architecture.

    Returns:
        The matplotlib figure, a panel for each architecture.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = new_figure(2 + 6 * len(standings), 5)
    panels = figure.subplots(1, len(standings), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (arch, standing) in zip(panels, standings.items(), strict=True):
        for row, seconds in standing.times():
            mean, half = Interval.of([*row.changes.values()])
            panel.errorbar(seconds, mean, half, marker="o", color="black", mfc="none", **BARS)
            name = "best fixed" if row is standing.best else row.method.rule
            panel.annotate(name, (seconds, mean), xytext=(5, 4), textcoords="offset points")
        panel.axhline(0, color="0.6", linestyle="--")
        panel.set(xscale="log", title=arch)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        tidy(panel)
    figure.supxlabel("seconds of training until the best epoch, validation left out")
    figure.supylabel("Delta_m % on test, lower is better; dashed: tasks alone")
    return figure
