"""Cross-stitch units: each task's mixture of the streams of all tasks."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

from arch_zoo.tensors import channels_first, mix, stack


class Stitch(nn.Module):
    """A cross-stitch unit after a stage: one :class:`Row` per task."""

    def __init__(
        self, depth: int, tasks: Sequence[str], granularity: str, self_weight: float
    ) -> None:
        super().__init__()
        if granularity not in ("channel", "layer"):
            raise ValueError(
                f"CrossStitch: `granularity` must be 'channel' or 'layer', got {granularity!r}."
            )
        if not 0 <= self_weight <= 1:
            raise ValueError(
                f"CrossStitch: `self_weight` must be between 0 and 1, got {self_weight}."
            )
        n = len(tasks)
        start = torch.eye(n)
        if n > 1:
            start = self_weight * start + (1 - self_weight) / (n - 1) * (1 - start)
        row = ChannelRow if granularity == "channel" else Row
        self.depth = depth
        self.rows = nn.ModuleDict({name: row(start[i].clone()) for i, name in enumerate(tasks)})

    def forward(self, streams: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        """Mix all streams for some tasks."""
        labelled = {repr(name): stream for name, stream in streams.items()}
        mixed = stack("CrossStitch", f"the outputs of `stages[{self.depth}]`", labelled)
        return {name: self.rows[name](mixed) for name in tasks}


class Row(nn.Module):
    """The weights with which one task reads all streams, ``[streams]`` or ``[streams, channels]``.

    Args:
        weight: Where they start.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, streams: Tensor) -> Tensor:
        """Mix streams ``[batch, streams, ...]``."""
        return mix("e" if self.weight.ndim == 1 else "ec", self.weight, streams)


class ChannelRow(LazyModuleMixin, Row):
    """A row for each channel, as many as the first input has.

    Args:
        weight: Where every channel starts, ``[streams]``.
    """

    cls_to_become = Row

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.start = weight.tolist()
        # a parameter at run time, though not to the type checker
        self.weight = UninitializedParameter()  # type: ignore[assignment]

    def initialize_parameters(self, streams: Tensor) -> None:
        if isinstance(self.weight, UninitializedParameter):
            channels = channels_first(streams[:, 0]).shape[1]
            self.weight.materialize((len(self.start), channels))
            with torch.no_grad():
                self.weight.copy_(self.weight.new_tensor(self.start).unsqueeze(1))
