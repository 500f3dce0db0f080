"""The two pictures of the demo; lines differ in dashes and marks, so grey paper will do."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from gradbal.demo.model import TASKS
from gradbal.demo.report import Look, Outcome, Report

DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKS = "os^Dv*XPhp"
GREYS = ("black", "0.35", "0.6")
BINS = 40  # points of a curve over time


def learning_curves(report: Report, path: Path) -> None:
    """Draw the validation scores after each epoch, one panel per task.

    Args:
        report: What the contest gave.
        path: Where to save the picture, as PNG.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(TASKS))
    shades = colormaps["viridis"]
    titles = ("left digit: wrong, %", "right digit: wrong, %", "distance: mean error, pixels")
    for panel, task, title in zip(panels, TASKS, titles, strict=True):
        read = _errors(task)
        last = max(len(report.outcomes) - 1, 1)
        epochs = range(1, len(report.baseline.validation) + 1)
        lines = zip(report.outcomes, cycle(DASHES), cycle(MARKS))  # noqa: B905  # cycles
        for i, (outcome, dash, mark) in enumerate(lines):
            style = {"linestyle": dash, "marker": mark, "color": shades(0.85 * i / last)}
            panel.plot(epochs, read(outcome), label=outcome.name, markersize=4, lw=1.3, **style)
        alone = read(report.baseline)
        panel.plot(epochs, alone, color="0.6", linewidth=4, label="single task", zorder=0)
        panel.set(title=title, xlabel="epoch", yscale="log")
        panel.grid(visible=True, which="both", color="0.92")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    figure.savefig(path, dpi=120)
