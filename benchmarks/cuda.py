"""Steps on a CUDA card, with peak memory: `python -m benchmarks.cuda`."""

import argparse
import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean, median
from time import perf_counter
from typing import Any

import torch

from benchmarks.contestants import PEERS, VECTOR, Build, contestants
from benchmarks.models import SharedTrunk, make_model, size_of
from benchmarks.reports import DTYPES, draw, parse, parser_of, write
from gradbal import MTLOptimizer
from gradbal.lab.bench.measure import Step, complaint
from gradbal.lab.bench.report import SUMMED

TASKS = (4, 2, 8)
HELD = "update_every=10"
EXPLANATION = f"""\
Milliseconds of a step and GiB at its peak with the summed loss; then how many times as long the
others take, and their peak. Medians of {{rounds}} steps after warming up, everyone alone on the
card, `{HELD}` the mean. `graph` is a whole step with `capturable=True`, forward pass and optimizer
included, replayed as a CUDA graph, beside the summed loss treated alike (`summed, graph`)."""


def adamw(model: SharedTrunk) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)


def replayed(model: SharedTrunk, take: Callable[[], None]) -> Step:
    """Return a step that is captured once and then replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            take()
    torch.cuda.current_stream().wait_stream(side)
    for param in model.parameters():
        param.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        take()
    return graph.replay


def summed_graph(model: SharedTrunk) -> Step:
    optimizer = adamw(model)

    def take() -> None:
        optimizer.zero_grad()
        torch.stack(model.losses()).sum().backward()
        optimizer.step()

    return replayed(model, take)


def balanced_graph(model: SharedTrunk) -> Step:
    optimizer = MTLOptimizer(adamw(model), "upgrad", engine="sequential", capturable=True)
    return replayed(model, lambda: optimizer.step(model.losses()))


def held(model: SharedTrunk) -> Step:
    optimizer = MTLOptimizer(adamw(model), "upgrad", update_every=10)
    return lambda: optimizer.step(model.losses())


def everyone(engines: Sequence[str]) -> dict[str, Build]:
    known = contestants(engines)
    ours = {name: build for name, build in known.items() if name not in (*PEERS, VECTOR)}
    own = {HELD: held, "summed, graph": summed_graph, "graph": balanced_graph}
    return {**ours, **own, **{name: known[name] for name in (*PEERS, VECTOR)}}


def measure(build: Build, model: SharedTrunk, name: str, rounds: int) -> dict[str, float]:
    """Return seconds and bytes at the peak of a step."""
    own = copy.deepcopy(model)
    step = build(own)
    for _ in range(10 if name in ("auto", HELD) else 3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        begin = perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(perf_counter() - begin)
    middle = mean if name == HELD else median
    return {"seconds": middle(times), "peak": torch.cuda.max_memory_allocated()}


def cell(name: str, n_tasks: int, given: argparse.Namespace) -> dict[str, Any]:
    """Measure everyone on one model, one after the other."""
    size = size_of(name, given.device)
    model = make_model(name, n_tasks, size, given.device, DTYPES[given.dtype])
    found: dict[str, Any] = {"model": name, "n_tasks": n_tasks, "steps": {}, "complaints": {}}
    for who, build in everyone(given.engines).items():
        gc.collect()
        torch.cuda.empty_cache()
        try:
            found["steps"][who] = measure(build, model, who, given.rounds)
        except Exception as error:
            found["complaints"][who] = complaint(error)
    return found


def entry(found: dict[str, Any], who: str) -> str:
    if who not in found["steps"]:
        return "-"
    step = found["steps"][who]
    peak = f"{step['peak'] / 2**30:.1f} GiB"
    if who == SUMMED:
        return f"{1e3 * step['seconds']:.1f} ms, {peak}"
    return f"{step['seconds'] / found['steps'][SUMMED]['seconds']:.2f}, {peak}"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write what the command line asks for."""
    parser = parser_of("cuda", __doc__ or "", TASKS)
    parser.set_defaults(device=torch.device("cuda"), dtype="bf16")
    parser.add_argument("--rounds", type=int, default=10, help="steps that are timed")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cell after this")
    given = parse(parser, argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA card")
    begin, cells = perf_counter(), []
    for n_tasks in given.tasks:
        for name in given.models:
            if perf_counter() - begin < given.seconds:
                cells.append(cell(name, n_tasks, given))
                print(name, n_tasks, {who: entry(cells[-1], who) for who in cells[-1]["steps"]})
    names = list(everyone(given.engines))
    rows = [("model", "tasks", *names)]
    rows += [(c["model"], str(c["n_tasks"]), *(entry(c, who) for who in names)) for c in cells]
    notes = [
        f"{c['model']} x {c['n_tasks']}: `{who}`: {why}"
        for c in cells
        for who, why in c["complaints"].items()
    ]
    explanation = EXPLANATION.format(rounds=given.rounds)
    write(given, "Steps on a card", explanation, rows, notes, cells)
    ratio = partial(_ratio, cells)
    draw(given.out.with_suffix(".png"), {m: ratio(m, names[1:]) for m in given.models}, 2, "times")


def _ratio(
    cells: Sequence[dict[str, Any]], model: str, names: Sequence[str]
) -> dict[str, list[tuple[float, float]]]:
    """Return for each contestant its time over that of the summed loss, by number of tasks."""
    here = sorted((c for c in cells if c["model"] == model), key=lambda c: c["n_tasks"])
    return {
        who: [
            (c["n_tasks"], c["steps"][who]["seconds"] / c["steps"][SUMMED]["seconds"])
            for c in here
            if {who, SUMMED} <= c["steps"].keys()
        ]
        for who in names
        if any(who in c["steps"] for c in here)
    }


if __name__ == "__main__":
    main()
