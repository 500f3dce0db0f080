"""The pictures of a comparison; marks and names differ, so grey paper will do."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

from gradbal.compare.intervals import Interval
from gradbal.compare.problem import Task
from gradbal.compare.rows import Row, Standing
from gradbal.compare.summary import Scores
from gradbal.plots import MARKS, new_figure, tidy


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
    for row, mark in zip(rules, cycle(MARKS), strict=False):
        (x, dx), (y, dy) = places[id(row)]
        panel.errorbar(x, y, dy, dx, mark, color="black", mfc="none", elinewidth=0.5)
        panel.lines[-1].set_label(row.method.rule)
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
        The matplotlib figure.
    """
    from matplotlib.ticker import NullFormatter

    figure = new_figure(8, 5)
    panel = figure.subplots()
    for (arch, standing), mark in zip(standings.items(), cycle(MARKS), strict=False):
        for i, (row, seconds) in enumerate(standing.times()):
            mean, half = Interval.of([*row.changes.values()])
            panel.errorbar(seconds, mean, half, fmt=mark, color="black", mfc="none", elinewidth=0.6)
            panel.lines[-1].set_label(None if i else arch)
            name = "best fixed" if row is standing.best else row.method.rule
            panel.annotate(name, (seconds, mean), xytext=(5, 4), textcoords="offset points")
    panel.axhline(0, color="0.6", linestyle="--")
    panel.set(xscale="log", xlabel="seconds of training until the best epoch, validation left out")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_ylabel("Delta_m % on test, lower is better; dashed: tasks alone")
    tidy(panel)
    figure.legend(loc="outside lower center", ncols=5)
    return figure
