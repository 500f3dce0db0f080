"""Ways of training in several processes, and what is counted and timed in each of them."""

import ctypes
import gc
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import SharedTrunk, Size, make_model
from gradbal import MTLOptimizer
from gradbal.distributed.collectives import Link
from gradbal.lab.bench.measure import Step
from gradbal.lab.bench.report import SUMMED
from gradbal.lab.bench.steps import summed_step

FindLink = Callable[[], Link | None]

CPU = torch.device("cpu")
WARMUP = 3  # steps before the first that counts
OTHERS = "by torch"  # what DDP and FSDP send, beside the kinds that this package counts


class Factor(NamedTuple):
    """How many gradients are sent with m tasks, times W / (W - 1)."""

    per_task: int
    always: int

    def __call__(self, n_tasks: int) -> int:
        return self.per_task * n_tasks + self.always

    def __str__(self) -> str:
        if not self.per_task:
            return str(self.always)
        per_task = "m" if self.per_task == 1 else f"{self.per_task} m"
        return f"({per_task} + {self.always})" if self.always else per_task


TWO = Factor(0, 2)


@dataclass(frozen=True)
class Mode:
    """A way of training in several processes.

    Args:
        trunk: What is sent of the trunk.
        heads: What is sent of the heads.
        rule: Name of the rule; None for the summed loss, without this package.
        engine: Name of the engine.
        sharded: Whether ``fully_shard`` spreads the model; else DDP has copies of it.
    """

    trunk: Factor
    heads: Factor = TWO
    rule: str | None = None
    engine: str = "sequential"
    sharded: bool = False

    @property
    def formula(self) -> str:
        return f"{self.trunk} n + {self.heads} h"

    def build(self, model: SharedTrunk) -> tuple[Step, FindLink]:
        """Return a step, and what gives its connection to the other processes, if it has one."""
        call: nn.Module = model
        if self.sharded:
            fully_shard(model.trunk)
            fully_shard(model)
        else:
            call = DistributedDataParallel(model, broadcast_buffers=False)  # they are the samples
        base = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if self.rule is None:
            return summed_step(base, call), lambda: None
        optimizer = MTLOptimizer(base, self.rule, engine=self.engine)
        return (
            lambda: optimizer.step(call()),
            lambda: getattr(optimizer._flow.processes, "link", None),
        )


MODES = {
    SUMMED: Mode(TWO),
    "ew": Mode(TWO, rule="ew"),
    "upgrad": Mode(Factor(1, 1), rule="upgrad"),
    "upgrad, streaming": Mode(Factor(1, 2), rule="upgrad", engine="streaming"),
    "upgrad, representation": Mode(TWO, rule="upgrad", engine="representation"),
    "graddrop": Mode(Factor(2, 0), rule="graddrop"),
    f"FSDP2: {SUMMED}": Mode(Factor(0, 3), sharded=True),
    "FSDP2: upgrad": Mode(Factor(2, 1), Factor(1, 1), "upgrad", sharded=True),
    "FSDP2: representation": Mode(
        Factor(1, 3), Factor(1, 2), "upgrad", "representation", sharded=True
    ),
}


class Wire(TorchDispatchMode):
    """Count what a process must send for the collective operations in the body.

    Attributes:
        sent: Bytes.
        calls: Operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        others = dist.get_world_size() - 1
        if name == "allreduce_":
            nbytes = 2 * sum(tensor.nbytes for tensor in args[0]) * others // (others + 1)
        elif name in ("alltoall_base_", "_reduce_scatter_base_"):
            nbytes = args[1].nbytes * others // (others + 1)
        elif name == "_allgather_base_":
            nbytes = args[1].nbytes * others
        else:
            raise ValueError(f"what does {name} send?")
        self.sent += nbytes
        self.calls += 1


@dataclass(frozen=True)
class Volume:
    """What one process sends.

    Args:
        sent: Bytes, by kind.
        calls: Operations, by kind.
    """

    sent: dict[str, int]
    calls: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def entry(self, kind: str) -> str:
        return f"{self.sent[kind]:,} in {self.calls[kind]}" if self.calls.get(kind) else "-"


@dataclass(frozen=True)
class Cell:
    """A model with so many tasks in so many processes: volume, seconds and peak of each mode."""

    model: str
    n_processes: int
    n_tasks: int
    unit: int  # bytes of one gradient of the trunk
    heads: int  # and of all heads
    volumes: dict[str, Volume]
    seconds: dict[str, float]
    peaks: dict[str, int] = field(default_factory=dict)

    @property
    def place(self) -> tuple[str, ...]:
        return (self.model, str(self.n_processes), str(self.n_tasks))

    @property
    def megabytes(self) -> str:
        return f"{self.unit / 1e6:.2f}"

    def expected(self, mode: str) -> float:
        """Return what the formula says, in bytes."""
        way, m = MODES[mode], self.n_tasks
        gradients = way.trunk(m) * self.unit + way.heads(m) * self.heads
        return gradients * (self.n_processes - 1) / self.n_processes

    def volume(self, mode: str) -> str:
        sent = self.volumes[mode].total
        return f"{sent / 1e6:.2f} ({sent / self.expected(mode):.3f})"

    def time(self, mode: str) -> str:
        if mode == SUMMED:
            return f"{1e3 * self.seconds[mode]:.0f} ms"
        return f"{self.seconds[mode] / self.seconds[SUMMED]:.2f}"

    def peak(self, mode: str) -> str:
        if mode == SUMMED:
            return f"{self.peaks[mode] / self.unit:.1f}"
        return f"{(self.peaks[mode] - self.peaks[SUMMED]) / self.unit:+.1f}"


class Job(NamedTuple):
    """What is measured."""

    model: str
    size: Size
    n_tasks: int
    rounds: int


def model_of(job: Job) -> SharedTrunk:
    """Return the same model in every process, with targets of its own."""
    model = make_model(job.model, job.n_tasks, job.size, CPU, torch.float32)
    model.targets.normal_(generator=torch.Generator().manual_seed(dist.get_rank()))
    return model


def measure(job: Job) -> Cell:
    """Count and time a step of every mode, all processes together."""
    built = {name: ready(mode, job) for name, mode in MODES.items()}
    steps = {name: step for name, (step, _) in built.items()}
    volumes = {name: count(*pair) for name, pair in built.items()}
    seconds = in_turn(steps, job.rounds)
    model = model_of(job)
    unit, heads = (
        sum(param.nbytes for param in part.parameters()) for part in (model.trunk, model.heads)
    )
    size = dist.get_world_size()
    return Cell(job.model, size, job.n_tasks, unit, heads, volumes, seconds)


def ready(mode: Mode, job: Job) -> tuple[Step, FindLink]:
    """Build a step and take the first ones, in which what is kept is made."""
    step, link = mode.build(model_of(job))
    for _ in range(WARMUP):
        step()
    return step, link


def peak(mode: Mode, job: Job) -> int:
    """Return the most bytes that this process has during a step, gloo's among them (Linux)."""
    gc.collect()
    before = resident("VmRSS")
    step, _ = ready(mode, job)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Return a count of the system's, in bytes."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[what].split()[0])


def return_freed_memory() -> None:
    """Give back every block of 128 KiB and more as soon as it is free (glibc)."""
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 2**17)


def count(step: Step, link: FindLink) -> Volume:
    """Count what a step sends: by our own kinds, and what is left over by others."""
    before = _so_far(link())
    with Wire() as wire:
        step()
    sent, calls = (now - then for now, then in zip(_so_far(link()), before, strict=True))
    others = wire.sent - sent.total(), wire.calls - calls.total()
    return Volume({**sent, OTHERS: others[0]}, {**calls, OTHERS: others[1]})


def _so_far(link: Link | None) -> tuple[Counter[str], Counter[str]]:
    return (Counter(link.sent), Counter(link.calls)) if link else (Counter(), Counter())


def in_turn(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Return the median seconds of each step; all processes take the same ones together."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            dist.barrier()
            start = perf_counter()
            steps[name]()
            times[name].append(perf_counter() - start)
    return {name: median(found) for name, found in times.items()}
