"""The choice of an engine: by count where that is clear, and by the clock where it is not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gradbal.graph.cost import ACCELERATOR, CPU, count, entries_at, free_bytes
from gradbal.graph.heads_and_trunk import Plan
from gradbal.jacobian.engines import Batched, Engine, Factored, Sequential, Streaming
from gradbal.jacobian.factored import find_layers
from gradbal.jacobian.pull import Segment
from gradbal.rules._base import GramRule, Rule

ENGINES: dict[str, Engine] = {
    "Sequential()": Sequential(),
    "Batched()": Batched(),
    "Factored()": Factored(),
    "Factored(chunk_size=None)": Factored(chunk_size=None),
    "Streaming(within=Factored())": Streaming(within=Factored()),
}
AT_ONCE = ("Batched()", "Factored(chunk_size=None)")  # that take all tasks down together
LITTLE = 2e-3  # counted seconds of all passes under which there is too little to gain, on a CPU
TIMED = 20e-3  # and those from which on engines are timed; below, runs are alike to the last bit
CLEAR = 1.5  # ratio of counted times from which on nothing is timed
EARLY = 1.3  # ratio of measured times from which on one round decides
ROUNDS = 3  # that are timed at most, of which the first warms up
ROOM = 0.8  # part of the free memory that may be used

Choices = Mapping[str, Mapping[str, str]]


@dataclass
class Trial:
    """Some engines, and the seconds that their steps took."""

    times: dict[str, list[float]]

    @property
    def next(self) -> str:
        """The engine whose turn it is."""
        return min(self.times, key=lambda name: len(self.times[name]))

    def best(self) -> dict[str, float] | None:
        """Return the shortest time of each, or None as long as more rounds are needed."""
        rounds = min(map(len, self.times.values()))
        if rounds < 2:
            return None
        found = {name: min(times[1:]) for name, times in self.times.items()}
        clear = max(found.values()) > EARLY * min(found.values())
        return found if clear or rounds >= ROUNDS else None


@dataclass
class Chooser:
    """Chooses an engine for every shape of a batch, and times some where counting cannot tell.

    What is timed are steps of the training: nothing is computed that is not used.

    Args:
        products: Whether the rule lets gradients go unformed.
        streams: Whether it can do without the gradients at all.
        timed: Whether engines may be timed, which reads the clock of the host.
    """

    products: bool
    streams: bool
    timed: bool
    trials: dict[str, Trial] = field(default_factory=dict)
    running: tuple[str, str, Any] | None = None

    def choose(
        self,
        choices: Choices,
        plan: Plan,
        params: Sequence[Tensor],
        *,
        streams: bool,
        products: bool = True,
        held: Callable[[], int] = int,
    ) -> tuple[Choices, Engine]:
        """Return the engine for a batch.

        Args:
            choices: What has been settled so far, by shape.
            plan: The plan.
            params: All parameters of the optimizer.
            streams: Whether the call can do without the gradients.
            products: Whether it can do with their factors.
            held: Gives the bytes of the rows of the step before, which the new ones may take.

        Returns:
            What is settled now, and the engine.
        """
        self.running = None
        if not plan.trunk or len(plan.tasks) < 2:
            return choices, ENGINES["Sequential()"]
        shape = _shape(plan)
        if shape not in choices and shape not in self.trials:
            can = {"streams": streams and self.streams, "products": products and self.products}
            settled = self._count(plan, params, shape, held, **can)
            choices = {**choices, **settled}
        if (trial := self.trials.get(shape)) is not None and shape not in choices:
            best = trial.best()
            if best is None:
                self.running = (shape, trial.next, _clock(params[plan.trunk[0]].device))
                return choices, ENGINES[trial.next]
            name, other, *_ = sorted(best, key=best.__getitem__)
            why = f"a step took {_ms(best[name])}, and {_ms(best[other])} with {other}"
            choices = {**choices, shape: {"engine": name, "why": why}}
            del self.trials[shape]
        name = choices[shape]["engine"]
        if isinstance(ENGINES[name], Streaming) and not streams:
            name = "Sequential()"
        return choices, ENGINES[name]

    def stop(self) -> None:
        """Note how long a step took that was timed."""
        if self.running is not None:
            shape, name, start = self.running
            self.trials[shape].times[name].append(_since(start))
            self.running = None

    def _count(
        self,
        plan: Plan,
        params: Sequence[Tensor],
        shape: str,
        held: Callable[[], int],
        *,
        streams: bool,
        products: bool,
    ) -> dict[str, dict[str, str]]:
        """Settle on an engine by count, or begin a trial."""
        m, device = len(plan.tasks), params[plan.trunk[0]].device
        rates = CPU if device.type == "cpu" else ACCELERATOR
        segment = Segment(plan.cut, [params[n] for n in plan.trunk], True, numbers=plan.trunk)
        layers = find_layers(segment, m) if products else {}
        formed = [params[n] for i, n in enumerate(plan.trunk) if i not in layers]
        row = sum(param.numel() * param.element_size() for param in formed)
        row += sum(4 * use.sizes.brought for layer in layers.values() for use in layer.uses)
        work, free = count(plan.cut), free_bytes(device)
        free = None if free is None else free + held()
        if streams and free is not None and m * row > ROOM * free:
            why = f"{m} task gradients of {row / 2**20:.0f} MiB do not fit into what is free"
            return {shape: {"engine": "Streaming(within=Factored())", "why": why}}
        names = _contestants(device, products=bool(layers))
        one = names[0]
        times = {name: work.seconds(rates, m, batched=name in AT_ONCE) for name in names}
        if device.type == "cpu" and times[one] < LITTLE:
            return {shape: {"engine": "Sequential()", "why": "the passes are too short to matter"}}
        name, other, *_ = sorted(times, key=times.__getitem__)
        if free is not None and m * (2 * row + 8 * work.largest) > ROOM * free:
            return {shape: {"engine": one, "why": "several tasks at once might not fit"}}
        clear = times[other] > CLEAR * times[name] or times[name] < TIMED
        if (device.type == "cpu" and clear) or not self._may_time():
            why = f"counted {_ms(times[name])}, and {_ms(times[other])} with {other}"
            return {shape: {"engine": name, "why": why}}
        self.trials[shape] = Trial({name: [] for name in names})
        return {}

    def _may_time(self) -> bool:
        """Say whether the choice may depend on the clock: not if every run is to be the same."""
        return self.timed and not torch.are_deterministic_algorithms_enabled()


def chooser_for(rule: Rule, *, one_group: bool, capturable: bool) -> Chooser:
    """Return what chooses the engine for a rule.

    Args:
        rule: The rule.
        one_group: Whether all parameters are in one group.
        capturable: Whether nothing may be read back.
    """
    grams = isinstance(rule, GramRule)
    return Chooser(products=grams, streams=grams and one_group, timed=not capturable)


def explained(choices: Choices, plan: Plan) -> str:
    """Say in words what has been chosen for a batch of this shape, and why."""
    found = choices.get(_shape(plan))
    if found is None:
        return "Engine Auto: will be chosen in the first steps, by count or by timing two of them."
    return f"Engine Auto: {found['engine']}, because {found['why']}."


def _contestants(device: torch.device, *, products: bool) -> tuple[str, ...]:
    """Return the engines among which is chosen, first one that takes the tasks one by one.

    On a CPU counting tells whether products cost less. On an accelerator that depends on the card
    (float64 may be 2 or 64 times as slow as float32), so formed gradients take part.
    """
    if not products:
        return "Sequential()", "Batched()"
    if device.type == "cpu":
        return "Factored()", "Factored(chunk_size=None)"
    return "Sequential()", "Batched()", "Factored()"


def _shape(plan: Plan) -> str:
    """Name what a choice depends on; sizes count in powers of two."""
    size = entries_at(plan.cut)
    return (
        f"{len(plan.tasks)} tasks, {len(plan.trunk)} parameters, 2^{size.bit_length()} at the cut"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _clock(device: torch.device) -> Any:
    """Return the time, or an event on a device that works on its own."""
    if device.type == "cpu":
        return perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record()
    return event


def _since(start: Any) -> float:
    """Return the seconds since then; waits for a device, a few times in a training."""
    if isinstance(start, float):
        return perf_counter() - start
    stop = torch.Event(start.device, enable_timing=True)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3
