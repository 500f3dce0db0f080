"""Decoders: heads that may read the features of other tasks, and what a model returns in full."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Prediction(NamedTuple):
    """An auxiliary prediction, which has the loss of a task.

    Args:
        task: Whose loss applies.
        value: What is predicted, as this task's output.
        weight: Of its loss within the task's.
    """

    task: str
    value: Any
    weight: float = 1.0


class Decoded(NamedTuple):
    """What a decoder makes of features.

    Args:
        outputs: By task; what has no loss of its own comes last, under other names.
        predictions: Auxiliary predictions by name.
        aux: Auxiliary losses by name, each without dimensions.
    """

    outputs: dict[str, Any]
    predictions: Mapping[str, Prediction] = {}
    aux: Mapping[str, Tensor] = {}


class Decoder(nn.Module, ABC):
    """Heads that are more than one module per task on the features of this task.

    It reads streams, which an architecture computes one by one as it would for tasks of these
    names, and gives outputs with losses, which are the tasks. An attribute ``takes`` names the
    inputs of the batch that it is handed, by default none.

    Args:
        tasks: Names of outputs with losses.
        streams: Names of streams; by default those of the tasks.
    """

    takes: Collection[str] | None = ()

    def __init__(self, tasks: Sequence[str], streams: Sequence[str] | None = None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.streams = self.tasks if streams is None else tuple(streams)

    def sources(self, task: str) -> tuple[str, ...]:
        """Return the streams that the output of a task reads; by default its own.

        Streams from which it takes values but sends no gradient back are among them.
        """
        return (task,)

    def gradients(self, task: str) -> tuple[str, ...]:
        """Return the streams that get a gradient from a task's loss; by default its sources."""
        return self.sources(task)

    @abstractmethod
    def reach(self) -> Iterator[tuple[nn.Module | nn.Parameter, Collection[str]]]:
        """Yield parts of the decoder with the tasks whose losses reach them.

        A part that only auxiliary predictions reach comes with the task of these predictions.
        """

    @abstractmethod
    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        """Compute the outputs of some tasks, and no private work of others.

        Args:
            streams: Features by stream, those of all sources of these tasks.
            tasks: Those to decode.
            named: Named inputs of the batch.
        """


class Result(NamedTuple):
    """All that a forward pass gives.

    Args:
        outputs: By task; what has no loss of its own comes last, under other names.
        aux: Auxiliary losses by name, each without dimensions; they are no tasks.
        predictions: Auxiliary predictions by name.
    """

    outputs: dict[str, Any]
    aux: dict[str, Tensor]
    predictions: dict[str, Prediction]


def task_losses(
    result: Result,
    criteria: Mapping[str, Callable[[Any, Any], Tensor]],
    targets: Mapping[str, Any],
) -> dict[str, Tensor]:
    r"""Return one loss per task, those of its auxiliary predictions included.

    .. math:: L_t = \ell_t(y_t) + \sum_p w_p \ell_t(p) \quad \text{for predictions } p \text{ of } t

    A task without an output, which only helps others, has its predictions alone. Tasks without a
    target have no loss. Add ``result.aux`` as auxiliary losses.

    Args:
        result: Of ``model.run(...)``.
        criteria: By task, functions of an output and a target.
        targets: By task.

    Raises:
        ValueError: If a task has a target and no criterion.

    Example:
        >>> import torch
        >>> y, half = torch.ones(2), Prediction("depth", torch.zeros(2), weight=0.5)
        >>> result = Result({"depth": y}, {}, {"depth/initial": half})
        >>> task_losses(result, {"depth": nn.functional.mse_loss}, {"depth": 2 * y})
        {'depth': tensor(3.)}
    """
    values = [(name, y, 1.0) for name, y in result.outputs.items()]
    values += result.predictions.values()
    losses: dict[str, Tensor] = {}
    for task, value, weight in values:
        if task not in targets:
            continue
        if task not in criteria:
            raise ValueError(
                f"task_losses: `criteria` must hold one for every target, got none for {task!r}."
            )
        loss = weight * criteria[task](value, targets[task])
        losses[task] = losses[task] + loss if task in losses else loss
    return losses
