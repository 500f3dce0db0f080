"""The two pictures of the demo; lines differ in dashes and marks, so grey paper will do."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

from gradbal.diagnostics.plots import DASHES, MARKS, POINTS, new_figure, tidy
from gradbal.lab.demo.model import HIGHER_IS_BETTER, TASKS
from gradbal.lab.demo.report import Look, Outcome, Report

GREYS = ("black", "0.4", "0.65")
BRANCHES = ("shared", "own copy", "skipped")  # of AutoMTL


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw both pictures of a contest; return the files."""
    curves, weights = folder / "learning-curves.png", folder / "weights-and-cosines.png"
    learning_curves(report, curves)
    weights_and_cosines(report, weights)
    return [curves, weights]


def learning_curves(report: Report, path: Path) -> None:
    """Draw the validation errors after each epoch, one panel per task.

    Args:
        report: What the contest gave.
        path: Where to save the picture, as PNG.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    figure = new_figure(12, 4.5)
    panels = figure.subplots(1, len(TASKS))
    last = max(len(report.outcomes) - 1, 1)
    for panel, task in zip(panels, TASKS, strict=True):
        epochs = range(1, len(report.baseline.validation) + 1)
        alone = _errors(report.baseline, task)
        panel.plot(epochs, alone, color="0.75", linewidth=5, marker="o", label="single task")
        looks = zip(report.outcomes, cycle(DASHES), cycle(MARKS), strict=False)
        for i, (outcome, dash, mark) in enumerate(looks):
            shade = colormaps["viridis"](0.85 * i / last)
            panel.plot(epochs, _errors(outcome, task), label=outcome.name, color=shade)
            panel.lines[-1].set(linestyle=dash, marker=mark, markersize=4.5, linewidth=1.4)
        title = f"{task} digit, % wrong" if HIGHER_IS_BETTER[task] else f"{task}, error in pixels"
        panel.set(title=title, xlabel="epoch", yscale="log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_locator(NullLocator())
        tidy(panel)
    figure.suptitle("On the validation pictures, after each epoch")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9)
    figure.savefig(path, dpi=120)


def weights_and_cosines(report: Report, path: Path) -> None:
    """Draw for each rule its weights, and how the task gradients stand to each other.

    Args:
        report: What the contest gave.
        path: Where to save the picture, as PNG.
    """
    figure = new_figure(11, 1 + 1.7 * len(report.outcomes))
    rows = figure.subplots(len(report.outcomes), 2, sharex=True, sharey="col", squeeze=False)
    for (left, right), outcome in zip(rows, report.outcomes, strict=True):
        looks = _thinned(outcome.looks)
        steps = [mean(look.step for look in some) for some in looks]
        if looks[0][0].weights is None:
            left.text(0.5, 0.5, "works entry by entry: no weights", ha="center", va="center")
            left.texts[-1].set_transform(left.transAxes)
        else:
            for i, task in enumerate(TASKS):
                left.plot(steps, [mean(_share(look, task) for look in some) for some in looks])
                left.lines[-1].set(color=GREYS[i], linestyle=DASHES[i], label=task)
        for i, pair in enumerate(looks[0][0].cosines):
            right.plot(steps, [mean(look.cosines[pair] for look in some) for some in looks])
            right.lines[-1].set(color=GREYS[i], linestyle=DASHES[i], label=pair)
        right.axhline(0, color="0.5", linewidth=0.8)
        left.set_ylabel(outcome.name, fontweight="bold")
        tidy(left)
        tidy(right)
    for panel, title in zip(rows[0], ("share of the weights", "cosine of gradients"), strict=True):
        panel.set_title(title)
    for panel in rows[-1]:
        panel.set_xlabel("step")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    figure.legend(*rows[0][1].get_legend_handles_labels(), loc="outside lower right", ncols=3)
    figure.savefig(path, dpi=120)


def search_course(course: Sequence[Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw how likely the branches were while a policy was searched, one panel per task.

    Args:
        course: At each look, by task the mean probabilities of the three branches.
        path: Where to save the picture, as PNG.
    """
    figure = new_figure(11, 3.5)
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        curves = zip(*(look[task] for look in course), strict=True)
        for curve, name, grey, dash in zip(curves, BRANCHES, GREYS, DASHES, strict=False):
            panel.plot(curve, color=grey, linestyle=dash, label=name)
        panel.set(title=task, xlabel="look at the search", ylim=(0, 1))
        tidy(panel)
    panels[0].set_ylabel("mean probability")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def _errors(outcome: Outcome, task: str) -> list[float]:
    """Return for each epoch what a smaller number is better of."""
    scores = [scores[task] for scores in outcome.validation]
    return [100 * (1 - score) for score in scores] if HIGHER_IS_BETTER[task] else scores


def _share(look: Look, task: str) -> float:
    weights = look.weights or {}
    return weights[task] / sum(abs(weight) for weight in weights.values())


def _thinned(looks: Sequence[Look]) -> list[Sequence[Look]]:
    """Put neighbouring looks together, so that a curve has no more than ``POINTS`` points."""
    size = -(-len(looks) // POINTS)
    return [looks[i : i + size] for i in range(0, len(looks), size)]
