"""Units between the networks of the tasks: each task's mixture of the streams of all tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from arch_zoo.layout import Width, axis_of
from arch_zoo.tensors import channels_back, mix, stack


class Stitch(nn.Module):
    """A unit after a stage: one row per task, which mixes the streams for this task.

    Args:
        depth: Index of the stage.
        rows: A module per task, from streams ``[batch, streams, ...]`` and the axis of channels of
            a stream to the mixture.
        layout: As stated by the user, or None.
        width: Of the last layer of the stage.
    """

    def __init__(
        self, depth: int, rows: Mapping[str, nn.Module], layout: str | None, width: Width | None
    ) -> None:
        super().__init__()
        self.depth = depth
        self.layout = layout
        self.width = width
        self.rows = nn.ModuleDict(rows)

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
        """Mix all streams for some tasks."""
        where = f"`stages[{self.depth}]`"
        labelled = {repr(name): stream for name, stream in streams.items()}
        mixed = stack("CrossStitch", f"the outputs of {where}", labelled)
        first = next(iter(streams.values()))
        if isinstance(first, Tensor):
            axis = axis_of("CrossStitch", where, first, self.layout, self.width)
        elif all(type(row) is Row for row in self.rows.values()):
            axis = 1
        else:
            raise ValueError(
                f"CrossStitch: {where} must return one tensor for units that look at channels, "
                f"got {type(first).__name__}. Use `granularity='layer'`."
            )
        return {name: self.rows[name](mixed, axis) for name in tasks}


def start_of(number: int, n: int, self_weight: float) -> list[float]:
    """Return weights of ``n`` items that sum to one, all but one of them even."""
    if n == 1:
        return [1.0]
    rest = (1 - self_weight) / (n - 1)
    return [self_weight if i == number else rest for i in range(n)]


class Row(nn.Module):
    """The weights with which one task reads all streams, ``[streams]`` or ``[streams, channels]``.

    Args:
        start: Where they start, one number per stream.
    """

    weight: nn.Parameter

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.start = list(start)
        self.weight = nn.Parameter(torch.empty(len(self.start)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the start."""
        start = self.weight.new_tensor(self.start)
        with torch.no_grad():
            self.weight.copy_(start if self.weight.ndim == 1 else start.unsqueeze(1))

    def forward(self, streams: Any, axis: int) -> Any:
        """Mix streams ``[batch, streams, ...]``, in one of which channels lie on this axis."""
        return mix("e" if self.weight.ndim == 1 else "ec", self.weight, streams, axis)


class ChannelRow(LazyModuleMixin, Row):
    """A row for each channel, as many as the first input has.

    Args:
        start: Where every channel starts, one number per stream.
    """

    cls_to_become = Row

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__(start)
        # a parameter at run time, though not to the type checker
        self.weight = UninitializedParameter()  # type: ignore[assignment]

    def initialize_parameters(self, streams: Tensor, axis: int) -> None:
        if isinstance(self.weight, UninitializedParameter):
            self.weight.materialize((len(self.start), streams.shape[axis + 1]))
            self.reset_parameters()


class SubspaceRow(nn.Module):
    """The weights with which the parts of one task's channels read those of all tasks.

    Args:
        start: Where they start, for each subspace of the task one number for each of every stream.
    """

    def __init__(self, start: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.start = [list(row) for row in start]
        parts = len(self.start)
        self.weight = nn.Parameter(torch.empty(parts, len(self.start[0]) // parts, parts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Go back to the start."""
        with torch.no_grad():
            self.weight.copy_(self.weight.new_tensor(self.start).reshape(self.weight.shape))

    def forward(self, streams: Tensor, axis: int) -> Tensor:
        """Mix streams ``[batch, streams, ...]``, in one of which channels lie on this axis."""
        parts, channels = len(self.weight), streams.shape[axis + 1]
        if channels % parts:
            raise ValueError(
                f"CrossStitch: `subspaces` must divide the channels of every stage, got {parts} "
                f"for {channels}."
            )
        split = torch.unflatten(streams.movedim(axis + 1, 2), 2, (parts, -1))
        mixed = torch.einsum("gsh,bsh...->bg...", self.weight, split)
        return channels_back(mixed.flatten(1, 2), axis)


class Reduction(nn.Module):
    """A layer over single positions from the channels of all streams to those of one.

    Args:
        start: Weight of each stream at the start, channel by channel.
        norm: Batch norm after it.
        act: ReLU after that.
    """

    weight: nn.Parameter

    def __init__(self, start: Sequence[float], norm: bool, act: bool) -> None:
        super().__init__()
        self.start = list(start)
        self.weight = nn.Parameter(torch.empty(0))
        self.norm = nn.LazyBatchNorm1d(momentum=0.05) if norm else nn.Identity()
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, streams: Tensor, axis: int) -> Tensor:
        """Reduce streams ``[batch, streams, ...]``, in one of which channels lie on this axis."""
        joined = streams.movedim(axis + 1, 2)
        y = torch.einsum("dsc,bsc...->bd...", self.weight, joined).contiguous()
        normed = self.norm(y.flatten(2) if y.ndim > 2 else y).reshape(y.shape)
        return channels_back(self.act(normed), axis)

    def reset_parameters(self) -> None:
        """Go back to the start."""
        with torch.no_grad():
            eye = torch.eye(len(self.weight)).to(self.weight).unsqueeze(1)
            self.weight.copy_(eye * self.weight.new_tensor(self.start)[:, None])


class LazyReduction(LazyModuleMixin, Reduction):
    """A :class:`Reduction` whose first input sets the channels."""

    cls_to_become = Reduction

    def __init__(self, start: Sequence[float], norm: bool, act: bool) -> None:
        super().__init__(start, norm, act)
        # a parameter at run time, though not to the type checker
        self.weight = UninitializedParameter()  # type: ignore[assignment]

    def initialize_parameters(self, streams: Tensor, axis: int) -> None:
        if isinstance(self.weight, UninitializedParameter):
            channels = streams.shape[axis + 1]
            self.weight.materialize((channels, len(self.start), channels))
            self.reset_parameters()
