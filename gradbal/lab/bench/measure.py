"""Time and memory of whole steps."""

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch.autograd.profiler import profile, record_function

Step = Callable[[], object]
Maker = Callable[[], Step]  # builds a model with all that belongs to it, and returns its step

WARMUP, ROUNDS = 8, 5  # steps before the first that counts, enough for Auto; fewest rounds
_BUILD, _PEAK = "gradbal::build", "gradbal::peak"


@dataclass(frozen=True)
class Timing:
    """Seconds of a step over some rounds: median, lower and upper quartile."""

    median: float
    low: float
    high: float
    rounds: int


def in_turn(
    makers: Mapping[str, Maker], seconds: float, device: torch.device
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Time steps in turn, so that what else the machine does meets all of them alike.

    Args:
        makers: What builds each step; all are built before the first round.
        seconds: Time for all rounds together; there are at least ``ROUNDS``.
        device: Waited for before the clock is read.

    Returns:
        The time of each step, and for each that raised an error what it said.
    """
    steps, complaints = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            for _ in range(WARMUP):
                step()
            steps[name] = step
        except Exception as error:
            complaints[name] = complaint(error)
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    begin, rounds = perf_counter(), 0
    gc.collect()
    while steps and (rounds < ROUNDS or perf_counter() - begin < seconds):
        draw.shuffle(order)  # nobody always comes after the same one
        for name in order:
            _wait_for(device)
            start = perf_counter()
            steps[name]()
            _wait_for(device)
            times[name].append(perf_counter() - start)
        rounds += 1
    return {name: _timing(some) for name, some in times.items()}, complaints


def complaint(error: Exception) -> str:
    """Return the first line of what an error says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _timing(times: Sequence[float]) -> Timing:
    low, _, high = quantiles(times, n=4)
    return Timing(median(times), low, high, len(times))


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peaks(makers: Sequence[Maker], device: torch.device) -> list[int]:
    """Count the most bytes that are held at once during a step after the first ones.

    All that was taken since the step was built and is still held counts: parameters, state,
    storage kept from step to step. On the CPU torch's profiler lists every block that is taken or
    given back.

    Args:
        makers: What builds each step; one exists at a time.
        device: Where to count; nothing is returned for a device that keeps no count.
    """
    if device.type != "cpu":
        counter = torch.get_device_module(device)
        if not hasattr(counter, "max_memory_allocated"):
            return []
        return [_device_peak(make, counter, device) for make in makers]
    with profile(profile_memory=True) as log:  # one for all: each writes lines of its own
        for make in makers:
            gc.collect()
            with record_function(_BUILD):
                step = _settled(make)
            with record_function(_PEAK):
                step()
            del step
    return _host_peaks(log.kineto_results.events())


def _settled(make: Maker) -> Step:
    """Build a step that has all storage it will keep."""
    step = make()
    for _ in range(WARMUP):
        step()
    return step


def _device_peak(make: Maker, counter: Any, device: torch.device) -> int:
    gc.collect()
    before: int = counter.memory_allocated(device)
    step = _settled(make)
    counter.reset_peak_memory_stats(device)
    step()
    return int(counter.max_memory_allocated(device) - before)


def _host_peaks(events: Sequence[Any]) -> list[int]:
    """Return the peak of each marked step, over what was held before it was built."""
    held, before, found, inside = 0, 0, [], False
    for event in sorted(events, key=lambda event: event.start_ns()):
        name = event.name()
        if name == _BUILD:
            before, inside = held, False
        elif name == _PEAK:
            found.append(held - before)
            inside = True
        elif name == "[memory]":
            held += event.nbytes()
            if inside:
                found[-1] = max(found[-1], held - before)
    return found
