"""What rules are compared on: tasks, examples, parts of a model, and how others trained it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from typing import NamedTuple, cast

import torch
from torch import Generator, Tensor

from gradbal.lab.models.encoders import Factory
from gradbal.lab.problems.losses import Loss
from gradbal.lab.problems.metrics import Metric


class Batch(NamedTuple):
    """Examples that are used together.

    Attributes:
        inputs: Of all tasks, shape ``[n, ...]``, or of each task that has some.
        targets: By task, shape ``[n, ...]``; NaN, or -1 for classes, where there is no label.
    """

    inputs: Tensor | dict[str, Tensor]
    targets: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What one head learns.

    Args:
        loss: Of outputs and targets, see :mod:`gradbal.lab.problems.losses`.
        metric: Makes a new accumulator of the figures that are reported.
        select: The figure that chooses between epochs and between settings.
    """

    loss: Loss
    metric: Callable[[], Metric]
    select: str

    @property
    def higher(self) -> Mapping[str, bool]:
        """For each figure whether a higher one is better."""
        return self.metric().higher


class Split(ABC):
    """Examples of which batches can be drawn."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        """Go through the examples once.

        Args:
            size: Examples in a batch, of each task where tasks have their own; fewer in the last.
            generator: Draws the order and what is changed at random, as training wants it; without
                one the examples come as they are, in their order.
        """


@dataclass(frozen=True)
class Examples(Split):
    """Examples in memory.

    Args:
        x: Inputs, shape ``[n, ...]``; bytes become floats from 0 to 1.
        y: Targets by task, shape ``[n, ...]``.
    """

    x: Tensor
    y: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        for index in _indices(len(self), size, generator):
            x = self.x[index]
            inputs = x / 255 if x.dtype == torch.uint8 else x
            yield Batch(inputs, {task: y[index] for task, y in self.y.items()})

    def take(self, index: Tensor) -> "Examples":
        """Return the examples of these numbers."""
        return Examples(self.x[index], {task: y[index] for task, y in self.y.items()})

    def to(self, device: torch.device) -> "Examples":
        """Return the examples on a device."""
        return Examples(self.x.to(device), {task: y.to(device) for task, y in self.y.items()})


@dataclass(frozen=True)
class Stored(Split):
    """Examples that are read when they are needed.

    Args:
        numbers: Of the examples, shape ``[n]``.
        read: Returns the example of a number, as inputs and targets by task.
        augment: Returns an example changed at random; applied where a generator is given.
    """

    numbers: Tensor
    read: Callable[[int], tuple[Tensor, dict[str, Tensor]]]
    augment: Callable[[Tensor, dict[str, Tensor], Generator], tuple[Tensor, dict[str, Tensor]]] = (
        lambda x, y, generator: (x, y)
    )

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        for index in _indices(len(self), size, generator):
            some = [self.read(number) for number in self.numbers[index].tolist()]
            if generator is not None:
                some = [self.augment(x, y, generator) for x, y in some]
            inputs, targets = zip(*some, strict=True)
            tasks = {task: torch.stack([y[task] for y in targets]) for task in targets[0]}
            yield Batch(torch.stack(inputs), tasks)


@dataclass(frozen=True)
class Apart(Split):
    """Examples of which each belongs to one task.

    In training every task has a batch in every step, so small tasks are gone through several times
    while the largest is gone through once. Otherwise each example comes once.

    Args:
        parts: The examples of each task.
    """

    parts: Mapping[str, Split]

    def __len__(self) -> int:
        return max(map(len, self.parts.values()))

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[Batch]:
        runs: dict[str, Iterator[Batch]] = {
            task: part.batches(size)
            if generator is None
            else chain.from_iterable(map(part.batches, repeat(size), repeat(generator)))
            for task, part in self.parts.items()
        }
        for _ in range(-(-len(self) // size)):
            drawn = {task: batch for task, run in runs.items() if (batch := next(run, None))}
            inputs = {t: cast(Tensor, batch.inputs) for t, batch in drawn.items()}  # not apart
            yield Batch(inputs, {task: batch.targets[task] for task, batch in drawn.items()})


def _indices(n: int, size: int, generator: Generator | None) -> tuple[Tensor, ...]:
    order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
    return torch.split(order, size)


@dataclass(frozen=True, kw_only=True)
class Published:
    """How others trained on it. Nothing here is done unasked.

    Args:
        source: Who.
        optimizer: As in ``torch.optim``; None where the source does not say.
        lrs: Learning rates that were tried.
        epochs: Passes through the training examples.
        batch: Examples in a batch.
        schedule: What became of the learning rate.
        reports: What the figures are of: which split, which epoch, how many seeds.
    """

    source: str
    optimizer: str | None = None
    lrs: tuple[float, ...] = ()
    epochs: int | None = None
    batch: int | None = None
    schedule: str = "constant"
    reports: str


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Several tasks with their examples, and the parts from which a model is made.

    An encoder is ``nn.Sequential(*(stage() for stage in stages))``; architectures of ``arch_zoo``
    take the stages and heads as they are. The global generator draws the parameters.

    Args:
        name: What tables call it.
        tasks: By name.
        train: To learn from.
        validation: To choose by.
        test: To report on, used once.
        stages: Makers of the parts of an encoder, the first one first.
        heads: Makers of the heads, by task; all read the encoder's output.
        batch: Examples in a batch.
        published: How others trained on it; None where nobody did.
    """

    name: str
    tasks: Mapping[str, Task]
    train: Split
    validation: Split
    test: Split
    stages: tuple[Factory, ...]
    heads: Mapping[str, Factory]
    batch: int
    published: Published | None = None
