"""What a crossing takes and gives."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from gradbal.crossing.layers import Layer
from gradbal.crossing.products import Product
from gradbal.graph import Boundary


class Segment(NamedTuple):
    """A piece of the graph, from a boundary down to parameters.

    Attributes:
        top: Edges at which the cotangents arrive.
        params: Tensors, or edges of the graph, whose gradients are wanted.
        retain_graph: Whether the graph must survive the last task, too.
        layers: Tensors whose gradients need not be formed, by position.
    """

    top: Boundary
    params: Sequence[Any]  # torch's stub allows no mixture
    retain_graph: bool
    layers: Mapping[int, Layer] = MappingProxyType({})


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
            Or a product that has not been formed.
    """

    tasks: int | slice
    grads: Sequence[Tensor | Product | None]


Cotangents = Iterable[Cotangent]
RowStream = Iterator[Rows]
Crossing = Callable[[Segment, Cotangents], RowStream]


def pull(
    tops: Sequence[GradientEdge],
    inputs: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    *,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Take cotangents down to tensors or edges, as ``torch.autograd.grad`` does.

    But what is returned for an edge has always been through the hooks on the tensor there;
    ``torch.autograd.grad`` leaves these out where the pass goes on to something below.
    """
    caught: dict[int, Tensor | None] = {}

    def catch(i: int, grads: Sequence[Tensor | None]) -> None:
        caught[i] = grads[inputs[i].output_nr]  # comes after the hooks on the tensor

    hooks = [
        edge.node.register_prehook(partial(catch, i))
        for i, edge in enumerate(inputs)
        if isinstance(edge, GradientEdge)
    ]
    try:
        grads = torch.autograd.grad(
            tops, list(inputs), cotangents, retain_graph=retain_graph, allow_unused=True
        )
    finally:
        for hook in hooks:
            hook.remove()
    return [caught.get(i, grad) for i, grad in enumerate(grads)]
