"""Pictures of what a rule does; dashes, marks and numbers differ, so grey paper will do.

Every function returns a matplotlib ``Figure`` of its own, outside of ``pyplot``: save it with
``figure.savefig(path)``.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from gradbal.diagnostics import Course, Layers, Recorder

DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 2)))
MARKS = "os^Dv*XPhp"
POINTS = 40  # of a curve over the steps; what lies between is averaged
CURVES = 8  # tasks with a curve of their own
NUMBERED = 12  # rows or columns up to which numbers stand in the cells
BINS = 20


def conflict_matrix(recorder: Recorder) -> Any:
    """Draw the mean cosine of every two task gradients.

    Args:
        recorder: Has seen steps of a rule that looks at gradients.

    Returns:
        The figure; cells with a negative mean are marked.

    Raises:
        ValueError: If no gradients were recorded.
    """
    course = _with_gradients(recorder, "conflict_matrix")
    m = len(course.tasks)
    cell = 0.45 if m <= NUMBERED else 0.25
    figure = new_figure(3.5 + cell * m, 2 + cell * m)
    panel = figure.subplots()
    means = course.cosines.nanmean(dim=0).fill_diagonal_(torch.nan)
    _cells(figure, panel, means, course.tasks, course.tasks)
    panel.set_title("mean cosine of task gradients")
    return figure


def cosine_histogram(recorder: Recorder) -> Any:
    """Draw how often which cosine was seen between two task gradients.

    Args:
        recorder: Has seen steps of a rule that looks at gradients.

    Returns:
        The figure; negative cosines are hatched.

    Raises:
        ValueError: If no gradients were recorded.
    """
    course = _with_gradients(recorder, "cosine_histogram")
    m = len(course.tasks)
    first, second = torch.triu_indices(m, m, offset=1)
    found = course.cosines[:, first, second]
    found = found[found.isfinite()]
    counts, edges = torch.histogram(found.clamp(-1, 1), BINS, range=(-1.0, 1.0))
    figure = new_figure(6, 3.6)
    panel = figure.subplots()
    shares = (counts / len(found)).tolist()
    bars = panel.bar(edges[:-1].tolist(), shares, 2 / BINS, align="edge", edgecolor="black")
    for i, bar in enumerate(bars):
        below = i < BINS // 2
        bar.set(facecolor="white" if below else "0.7", hatch="////" if below else None)
    panel.axvline(0, color="black", linewidth=1.2)
    panel.set(xlabel="cosine", ylabel="share", xlim=(-1, 1))
    panel.set_title(f"cosines of task gradients, {(found < 0).double().mean():.0%} below zero")
    tidy(panel)
    return figure


def weights_over_time(recorder: Recorder) -> Any:
    """Draw the tasks' weights over the steps.

    Args:
        recorder: Has seen steps of a rule that gives weights.

    Returns:
        The figure.

    Raises:
        ValueError: If no weights were recorded.
    """
    course = recorder.course()
    if not course.weights.isfinite().any():
        raise ValueError(
            "weights_over_time: no weights were recorded; the rule works entry by entry, or no "
            "step was taken."
        )
    return _over_time(course, course.weights, "weight")


def norms_over_time(recorder: Recorder) -> Any:
    """Draw the lengths of the task gradients over the steps, on a logarithmic axis.

    Args:
        recorder: Has seen steps of a rule that looks at gradients.

    Returns:
        The figure.

    Raises:
        ValueError: If no gradients were recorded.
    """
    course = _with_gradients(recorder, "norms_over_time")
    figure = _over_time(course, course.norms, "length of the task gradient")
    figure.axes[0].set_yscale("log")
    return figure


def layer_map(layers: Layers) -> Any:
    """Draw in which layers the task gradients conflict.

    Args:
        layers: What :func:`gradbal.diagnostics.layer_conflicts` found.

    Returns:
        The figure: a row per layer, and a column per pair of tasks, or with many tasks one per
        task with its lowest cosine.
    """
    m = len(layers.tasks)
    first, second = torch.triu_indices(m, m, offset=1).tolist()
    cosines = torch.stack([*layers.cosines.values()])
    if len(first) <= NUMBERED:
        title, found = "cosine", cosines[:, first, second]
        pairs = zip(first, second, strict=True)
        columns = [f"{layers.tasks[i]} / {layers.tasks[j]}" for i, j in pairs]
    else:
        title, columns = "lowest cosine with another task", [*layers.tasks]
        found = cosines.nan_to_num(torch.inf).amin(dim=2)
        found = found.where(found.isfinite(), torch.nan)
    rows = len(found)
    figure = new_figure(4 + 0.5 * len(columns), 2 + 0.28 * rows)
    panel = figure.subplots()
    _cells(figure, panel, found, [*layers.grams], columns)
    panel.set_title(title)
    return figure


# ---------------------------------------------------------------------- what pictures share


def new_figure(width: float, height: float) -> Any:  # a Figure; matplotlib's own types are loose
    """Return a figure that no other code knows.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tidy(panel: Any) -> None:
    """Give axes a light grid and no frame above and to the right."""
    panel.grid(visible=True, which="both", color="0.93")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _with_gradients(recorder: Recorder, plot: str) -> Course:
    course = recorder.course()
    if not course.grams.isfinite().any():
        raise ValueError(
            f"{plot}: no gradients were recorded; the rule looks at the losses alone, or no step "
            "was taken."
        )
    return course


def _over_time(course: Course, values: Tensor, label: str) -> Any:
    """Draw a curve per task; with many tasks those that stand out, and the others as a band."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(8, 4)
    panel = figure.subplots()
    size = -(-len(values) // POINTS)
    steps = [part.double().mean().item() for part in torch.split(course.steps, size)]
    curves = torch.stack([part.nanmean(dim=0) for part in torch.split(values, size)])
    means = values.nanmean(dim=0)
    order = (means - means.nanmedian()).abs().nan_to_num(-1.0).argsort(descending=True)
    shown, others = sorted(order[:CURVES].tolist()), order[CURVES:]
    if len(others):
        band = curves[:, others]
        low, high = band.nan_to_num(torch.inf).amin(dim=1), band.nan_to_num(-torch.inf).amax(dim=1)
        panel.fill_between(
            steps, low.numpy(), high.numpy(), where=(low <= high).numpy(), color="0.85"
        )
        panel.collections[-1].set_label(f"{len(others)} others")
    for place, (i, dash, mark) in enumerate(zip(shown, cycle(DASHES), cycle(MARKS), strict=False)):
        shade = colormaps["viridis"](0.85 * place / max(len(shown) - 1, 1))
        panel.plot(steps, curves[:, i].tolist(), label=course.tasks[i], color=shade, linestyle=dash)
        panel.lines[-1].set(marker=mark, markersize=4.5, linewidth=1.4)
        panel.lines[-1].set_markevery((place, max(len(steps) // 6, 1)))
    panel.set(xlabel="step", ylabel=label)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    tidy(panel)
    figure.legend(loc="outside lower center", ncols=5)
    return figure


def _cells(
    figure: Any, panel: Any, values: Tensor, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Draw cosines as cells from dark to light, numbers in them, or a mark where negative."""
    image = panel.imshow(values.numpy(), cmap="cividis", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, ax=panel, label="cosine")
    panel.set_xticks(range(len(columns)), columns, rotation=90)
    panel.set_yticks(range(len(rows)), rows)
    if len(columns) <= NUMBERED:
        for i, row in enumerate(values.tolist()):
            for j, value in enumerate(row):
                text = "" if value != value else f"{value:.2f}"
                shade = "white" if value < 0 else "black"
                panel.text(j, i, text, ha="center", va="center", color=shade, fontsize=8)
    else:
        y, x = (values < 0).nonzero(as_tuple=True)
        panel.plot(x.tolist(), y.tolist(), "_", color="white", markersize=4)
