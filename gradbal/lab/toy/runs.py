"""Runs of the toy: who reaches the front from where, as a table and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gradbal.diagnostics.plots import DASHES, MARKS, new_figure, tidy
from gradbal.lab.compare.tables import Line
from gradbal.lab.toy.problem import CENTRE, NEAR, PROTOCOLS, distance, losses, pareto_front, paths
from gradbal.lab.training import resume
from gradbal.lab.training.resume import Kept

SPREAD = 0.01  # deviation of perturbed starts
RULES_BY_DEFAULT = ("ew", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "famo", "upgrad")
SIZE = 10.0  # of the plane that is drawn, from its middle
Path2D = tuple[tuple[float, float], ...]


@dataclass(frozen=True, order=True)
class Cell:
    """What is run.

    Args:
        protocol: One of ``PROTOCOLS``.
        rule: A registered rule.
        copies: Runs from each start: one as it is, the others from points near it.
        steps: Of Adam.
    """

    protocol: str
    rule: str
    copies: int
    steps: int

    def __str__(self) -> str:
        return f"toy {self.protocol} {self.rule}"


@dataclass(frozen=True)
class Record(Kept):
    """What came out.

    Args:
        cell: What was run.
        ways: Of the unperturbed runs, one for each start.
        arrivals: For each start and copy the step from which on it is at the front; -1 for one
            that is not there in the end.
    """

    cell: Cell
    ways: tuple[Path2D, ...]
    arrivals: tuple[tuple[int, ...], ...]


def follow(cell: Cell) -> Record:
    """Run one rule from all starts and their copies at once."""
    protocol = PROTOCOLS[cell.protocol]
    draw = torch.Generator().manual_seed(0)
    starts = torch.tensor(protocol.starts).repeat_interleave(cell.copies, dim=0)
    moved = SPREAD * torch.randn(starts.shape, generator=draw)
    moved[:: cell.copies] = 0
    runs = [(cell.rule, (x, y)) for x, y in (starts + moved).tolist()]
    frames = paths(runs, protocol, cell.steps)
    found = arrivals(frames, cell.steps)
    ways = frames[:, :: cell.copies].transpose(0, 1).tolist()
    by_start = zip(*[iter(found)] * cell.copies, strict=True)
    return Record(cell, tuple(tuple(map(tuple, way)) for way in ways), tuple(by_start))


def arrivals(frames: torch.Tensor, steps: int) -> list[int]:
    """Return for each run the step from which on it is at the front; -1 where it is not.

    Args:
        frames: As :func:`gradbal.lab.toy.problem.paths` returns them, shape ``[frames, n, 2]``.
        steps: Between the first and the last.
    """
    away = (distance(frames) > NEAR).int()
    last = len(away) - 1 - away.flip(0).argmax(dim=0)  # the last frame away from it
    first = (last + 1).where(away.any(dim=0), 0)
    reached = first < len(away)
    return (first * steps // (len(away) - 1)).where(reached, -1).tolist()


def run(
    protocol: str,
    rules: Sequence[str],
    out: Path,
    *,
    copies: int = 3,
    jobs: int = 1,
    steps: int | None = None,
    quiet: bool = False,
) -> tuple[list[Record], dict[str, str]]:
    """Run what the output folder does not hold yet.

    Args:
        protocol: One of ``PROTOCOLS``.
        rules: Registered names.
        out: The folder.
        copies: Runs from each start.
        jobs: Processes.
        steps: Other than the protocol has; None for as many.
        quiet: Show no progress.

    Returns:
        What came out, and for every rule that failed the reason.
    """
    for rule in rules:
        PROTOCOLS[protocol].rule(rule)
    steps = steps or PROTOCOLS[protocol].steps
    cells = [Cell(protocol, rule, copies, steps) for rule in rules]
    found, failed = resume.run(cells, out / "toy.jsonl", follow, Record, jobs=jobs, quiet=quiet)
    return [*found.values()], {cell.rule: why for cell, why in failed.items()}


def lines(records: Sequence[Record]) -> list[Line]:
    """Return the table of who reaches the front from where, its head first."""
    protocol = PROTOCOLS[records[0].cell.protocol]
    head = ["rule", *(f"({x:g}, {y:g})" for x, y in protocol.starts), "ends at x"]
    table: list[Line] = [head]
    for record in records:
        ends = ", ".join(f"{way[-1][0]:.1f}" for way in record.ways)
        table.append([record.cell.rule, *map(_reached, record.arrivals), ends])
    return table


def _reached(steps: Sequence[int]) -> str:
    there = [step for step in steps if step >= 0]
    when = f", step {median(there):.0f}" if there else ""
    return f"{len(there)} of {len(steps)}{when}"


def draw(records: Sequence[Record]) -> Any:
    """Draw the ways of all rules over the contours of the summed loss.

    Args:
        records: Of one protocol.

    Returns:
        The matplotlib figure, one panel per rule; the thick line is the Pareto set.
    """
    protocol = PROTOCOLS[records[0].cell.protocol]
    ticks = torch.linspace(-SIZE, SIZE, 200, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
    heights = losses(plane, protocol.scale).sum(dim=-1)
    x = torch.linspace(-CENTRE, CENTRE, 100, dtype=torch.float64)
    columns = min(len(records), 4)
    rows = -(-len(records) // columns)
    figure = new_figure(3.4 * columns, 3.6 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, record in zip(panels, records, strict=False):
        panel.contour(ticks, ticks, heights, levels=12, cmap="Greys_r", linewidths=0.6)
        panel.plot(x, pareto_front(x), color="0.6", linewidth=6, solid_capstyle="round")
        for way, dash, mark in zip(record.ways, DASHES, MARKS, strict=False):
            panel.plot(*zip(*way, strict=True), color="black", linestyle=dash, linewidth=1.3)
            panel.plot(*way[0], mark, color="black", mfc="white")
            panel.plot(*way[-1], "*", color="black", markersize=9)
        panel.set_title(record.cell.rule)
        tidy(panel)
    for panel in panels[len(records) :]:
        panel.set_visible(False)
    figure.suptitle(f"{protocol.source}: {records[0].cell.steps} steps; stars are the ends")
    return figure
