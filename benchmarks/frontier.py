"""What each mode costs in time and in quality: the summary over seeds, its table, its picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from gradbal._utils.tables import markdown_table
from gradbal.diagnostics.plots import new_figure, tidy
from gradbal.lab.training.intervals import Interval
from gradbal.lab.training.loop import ALONE, Tasks
from gradbal.lab.training.summary import main_delta_m

EXACT, PLAIN = "exact", "plain sum"


class Point(NamedTuple):
    """A mode of a rule.

    Args:
        mode: Its name.
        time: Time of a step over that of the plain summed loss, median over seeds.
        delta: Delta_m in percent.
        less: Delta_m less that of the exact mode, seed by seed; None for this itself.
    """

    mode: str
    time: float
    delta: Interval
    less: Interval | None


def frontier(rule: str, records: Iterable[Any], tasks: Tasks) -> list[Point]:
    """Summarise one rule on one problem; modes with fewer than two seeds are left out.

    Args:
        rule: The rule; the plain sum is put before it.
        records: Of the problem, each with ``cell``, ``scores`` and ``time``.
        tasks: The tasks.
    """
    alone: dict[int, dict[str, float]] = {}
    found: dict[str, dict[int, Any]] = {}
    for record in records:
        cell = record.cell
        if cell.mode == ALONE:
            alone.setdefault(cell.seed, {}).update(record.scores)
        elif cell.rule in ("ew", rule):
            mode = PLAIN if cell.rule == "ew" else cell.mode
            found.setdefault(mode, {})[cell.seed] = record
    whole = {seed: scores for seed, scores in alone.items() if scores.keys() == tasks.keys()}
    deltas = {
        mode: {s: main_delta_m(r.scores, whole[s], tasks) for s, r in some.items() if s in whole}
        for mode, some in found.items()
    }
    exact = deltas.get(EXACT, {})
    points = []
    for mode, some in deltas.items():
        pairs = [some[seed] - exact[seed] for seed in some if seed in exact]
        if len(pairs) > 1:
            time = median(record.time for record in found[mode].values())
            less = None if mode == EXACT else Interval.of(pairs)
            points.append(Point(mode, time, Interval.of([*some.values()]), less))
    return points


def table(rule: str, points: Sequence[Point]) -> str:
    """Write one line per mode; differences that the seeds do not explain are bold."""
    lines = [[f"mode of `{rule}`", "step time", "Delta_m %", "less exact"]]
    for mode, time, delta, less in points:
        shown = "" if less is None else f"**{less}**" if less.clear else str(less)
        lines.append([mode, f"{time:.2f}", str(delta), shown])
    return markdown_table(lines)


def draw(frontiers: Mapping[str, Sequence[Point]], title: str, path: Path) -> None:
    """Draw step time against Delta_m.

    Bars are the intervals of the paired differences to the exact mode, whose level is a line: what
    all modes owe to a seed does not tell them apart.

    Args:
        frontiers: The points of each rule.
        title: What stands above.
        path: Where to save the picture, as PNG.
    """
    figure = new_figure(1 + 8 * len(frontiers), 5.5)
    panels = figure.subplots(1, len(frontiers), sharey=True, squeeze=False)[0]
    for panel, (rule, points) in zip(panels, frontiers.items(), strict=True):
        for point in points:
            mode, time, level = point.mode, point.time, point.delta.mean
            if point.less is None:
                panel.axhline(level, color="0.5", linestyle="--", linewidth=0.8)
                panel.plot(time, level, "ks")
            else:
                panel.errorbar(time, level, point.less.half, fmt="ko", capsize=3)
            place = {"xytext": (5, 4), "textcoords": "offset points", "rotation": 35}
            panel.annotate(mode, (time, level), **place)
        panel.set(title=f"{rule} on {title}", xlabel="time of a step over the plain summed loss")
        panel.margins(x=0.1)
        tidy(panel)
    panels[0].set_ylabel("Delta_m %, lower is better; 95 % of the difference to exact")
    figure.savefig(path, dpi=120)
