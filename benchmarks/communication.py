"""What several processes send each other in a step, and what time and memory it takes.

``python -m benchmarks.communication --processes 1 2 4``, from the root of the repository; starts
the processes itself, on this machine (Linux), connected by gloo.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.models import Size
from benchmarks.reports import facts, heading, keep_freed_memory
from benchmarks.spread import (
    CPU,
    MODES,
    SUMMED,
    Cell,
    Job,
    measure,
    peak,
    ready,
    return_freed_memory,
)
from gradbal._utils.tables import markdown_table

EXPLANATION = """\
Every process has a batch of its own, and holds a copy of the model (DDP) or a part of it (FSDP2,
with the trunk as one unit and the heads as another). Compared are the plain summed loss, `ew` as a
rule on losses, and rules on gradients: `upgrad` with rows that are averaged in parts, with the
engines `streaming` and `representation`, and `graddrop`, which needs whole rows everywhere. Here n
stands for the bytes of one gradient of the trunk, h for those of all heads, m for the number of
tasks, W for the number of processes."""
SIZES = {  # a plain step takes a few milliseconds on one core
    "mlp": Size(batch=64, width=512, depth=3, length=256),
    "cnn": Size(batch=4, width=64, depth=3, length=32),
    "transformer": Size(batch=8, width=128, depth=2, length=32),
    "recommender": Size(batch=128, width=16, depth=2, length=30_000),
}


def work(rank: int, size: int, folder: str, jobs: Sequence[Job]) -> None:
    """Measure in one of so many processes; the first one writes down what was found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/meeting", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return_freed_memory()
    for job in jobs:
        ready(MODES[SUMMED], job)  # what torch takes once is not to be counted
    held = [{name: peak(mode, job) for name, mode in MODES.items()} for job in jobs]
    keep_freed_memory()
    cells = [replace(measure(job), peaks=found) for job, found in zip(jobs, held, strict=True)]
    if rank == 0:
        torch.save(cells, f"{folder}/cells")
    dist.destroy_process_group()


def measured(n_processes: int, jobs: Sequence[Job]) -> list[Cell]:
    """Start processes that measure, and return what they found."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (n_processes, folder, jobs), n_processes)
        found: list[Cell] = torch.load(f"{folder}/cells", weights_only=False)
    return found


def page(found: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """Write all tables."""
    place = ("model", "processes", "tasks")
    many = [cell for cell in cells if cell.n_processes > 1]
    sent = [(*place, "n", *(f"{name}: {way.formula}" for name, way in MODES.items()))]
    sent += [(*cell.place, cell.megabytes, *map(cell.volume, MODES)) for cell in many]
    time = [(*place, *MODES), *((*cell.place, *map(cell.time, MODES)) for cell in cells)]
    held = [(*place, *MODES), *((*cell.place, *map(cell.peak, MODES)) for cell in cells)]
    parts = [
        heading("Communication of a step", found),
        EXPLANATION,
        "## Bytes",
        "Megabytes that one process must send in a step, after the first ones; in brackets, how "
        "many times what the formula at the head of the column gives, times (W - 1) / W. Every "
        "collective operation counts, whoever calls it, as the fewest bytes that an algorithm can "
        "do with: (W - 1) / W of what is gathered or scattered, twice that of a sum that all get. "
        "Beyond the formula there are agreements of some hundred bytes and what makes parts equal.",
        markdown_table(sent, code=True),
    ]
    if many:
        last = many[-1]
        parts += [
            "## By kind",
            f"Bytes, and in how many operations: {last.model}, {last.n_processes} "
            f"processes, {last.n_tasks} tasks.",
            markdown_table(by_kind(last), code=True),
        ]
    parts += [
        "## Time",
        "Milliseconds of a step of the summed loss under DDP, then how many times as long the "
        "others take with as many processes: medians of steps in turn. More processes than cores "
        "take turns on them, and all talk through this machine's memory: read the ratios.",
        markdown_table(time, code=True),
        "## Memory",
        "Most memory that one process has in a step, gloo's buffers included, beyond what it had "
        "before the model was made, in n: for the summed loss under DDP in all, for the others "
        "more or less than that.",
        markdown_table(held, code=True),
    ]
    return "\n\n".join(parts) + "\n"


def by_kind(cell: Cell) -> list[tuple[str, ...]]:
    """Return a table of what each mode sends."""
    kinds = sorted({kind for one in cell.volumes.values() for kind in one.sent})
    rows = [(name, *map(one.entry, kinds)) for name, one in cell.volumes.items()]
    return [("mode", *kinds), *rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.communication", description=__doc__)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], metavar="W")
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 3, 8], metavar="M")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/communication.md"), help="the tables"
    )
    parser.set_defaults(device=CPU, dtype="float32", threads=1, memory="")
    given = parser.parse_args(argv)
    given.command = " ".join([parser.prog, *(sys.argv[1:] if argv is None else argv)])
    jobs = [
        Job(model, SIZES[model], m, given.rounds) for model in given.models for m in given.tasks
    ]
    cells = [cell for size in given.processes for cell in measured(size, jobs)]
    found = facts(given)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(page(found, cells))
    record = {**found, "cells": [asdict(cell) for cell in cells]}
    given.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(page(found, cells))


if __name__ == "__main__":
    main()
