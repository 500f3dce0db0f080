"""What a crossing takes and gives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from gradbal.graph import Boundary


class Segment(NamedTuple):
    """A piece of the graph, from a boundary down to parameters.

    Attributes:
        top: Edges at which the cotangents arrive.
        params: Tensors whose gradients are wanted.
        retain_graph: Whether the graph must survive the last task, too.
    """

    top: Boundary
    params: Sequence[Tensor]
    retain_graph: bool


class Cotangent(NamedTuple):
    """One task's gradient at the top of a segment.

    Attributes:
        task: Number of the task.
        values: One tensor per edge, or None where the task does not pass that edge.
        last: Whether no other task follows.
    """

    task: int
    values: Sequence[Tensor | None]
    last: bool


class Rows(NamedTuple):
    """Gradients of some tasks.

    Attributes:
        tasks: Number of the task, or the slice of tasks.
        grads: One tensor per parameter, with a leading axis for a slice; None for no gradient.
    """

    tasks: int | slice
    grads: Sequence[Tensor | None]


Cotangents = Iterable[Cotangent]
RowStream = Iterator[Rows]
Crossing = Callable[[Segment, Cotangents], RowStream]
