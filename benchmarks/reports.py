"""What the benchmarks of steps share: their command line, and the files that they write."""

import argparse
import ctypes
import json
import os
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import MODELS
from gradbal._utils.tables import markdown_table
from gradbal.diagnostics.plots import DASHES, MARKS, new_figure, tidy
from gradbal.jacobian.engines import PRESETS

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Curve = Sequence[tuple[float, float]]


def parser_of(command: str, what: str, tasks: Sequence[int]) -> argparse.ArgumentParser:
    """Return the options that both benchmarks have."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{command}", description=what)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tasks", nargs="+", type=int, default=tasks, help="numbers of tasks")
    parser.add_argument("--engines", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(f"benchmarks/results/{command}.md"),
        help="the table (default: %(default)s); JSON and picture go beside it",
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and set the number of threads."""
    given = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    given.command = " ".join([parser.prog, *words])
    torch.set_num_threads(given.threads)
    kept = given.device.type == "cpu" and keep_freed_memory()
    given.memory = ", freed memory kept by the process" if kept else ""
    warnings.filterwarnings("ignore", "There is a performance drop")  # the figures show it
    return given


def keep_freed_memory() -> bool:
    """Let the process keep what it frees, so that no step waits for another's pages (glibc).

    Otherwise up to a third of a step's time is the system's, handing the same pages out anew, and
    who is hit by it changes with the order of the contestants.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    trim_threshold, largest_number_of_mappings = -1, -4
    kept = library.mallopt(trim_threshold, 2**31 - 1)
    return bool(kept and library.mallopt(largest_number_of_mappings, 0))


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Return what one must know to run it again."""
    known = {"torch": torch.__version__, "Python": platform.python_version()}
    try:
        known["TorchJD"] = version("torchjd")
    except PackageNotFoundError:
        known["TorchJD"] = "not installed"
    if given.device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        machine = f"{platform.machine()} with {capability}, {os.cpu_count()} cores{given.memory}"
    else:
        machine = torch.get_device_module(given.device).get_device_name(given.device)
    return {
        "command": given.command,
        "date": str(date.today()),
        "machine": machine,
        "threads": given.threads,
        "dtype": given.dtype,
        "versions": known,
    }


def heading(title: str, found: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"# {title}\n\nMade by `{found['command']}` on {found['date']}: {found['machine']}, "
        f"{found['threads']} thread(s), {found['dtype']}; {versions}."
    )


def write(
    given: argparse.Namespace,
    title: str,
    explanation: str,
    rows: Sequence[tuple[str, ...]],
    notes: Sequence[str],
    cells: Sequence[Mapping[str, Any]],
) -> None:
    """Print the table with its notes, and keep it with all figures as JSON.

    Args:
        given: The command line.
        title: Of the page.
        explanation: How to read the table.
        rows: The table, its header first.
        notes: What is to be said below.
        cells: All figures.
    """
    found = facts(given)
    remarks = "\n".join(f"- {note}" for note in notes)
    table = markdown_table(rows, code=True)
    page = f"{heading(title, found)}\n\n{explanation}\n\n{table}\n\n{remarks}\n"
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page)
    record = {**found, "cells": cells}
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(page)


def draw(path: Path, panels: Mapping[str, Mapping[str, Curve]], columns: int, y_label: str) -> None:
    """Draw curves on logarithmic axes; dashes and marks differ, so grey paper will do.

    Args:
        path: Where to save the picture, as PNG.
        panels: For each panel, by its title, the curves over the number of tasks by their names.
        columns: Panels side by side.
        y_label: What the curves show.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullLocator

    rows = len(panels) // columns
    figure = new_figure(1 + 3.6 * columns, 1 + 3.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    styles = dict(zip(names, zip(cycle(DASHES), cycle(MARKS), strict=False), strict=False))
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for name, points in curves.items():
            dash, mark = styles[name]
            shade = colormaps["viridis"](0.85 * names.index(name) / len(names))
            axis.plot(*zip(*points, strict=True), label=name, color=shade, linestyle=dash)
            axis.lines[-1].set(marker=mark, markersize=5, linewidth=1.3)
        axis.set(title=title, xscale="log", yscale="log")
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        tidy(axis)
    for axis in axes[-columns:]:
        axis.set_xlabel("tasks")
    figure.supylabel(y_label)
    handles = {h.get_label(): h for axis in axes for h in axis.lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)
