"""What a crossing takes and gives."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

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
        bottom: Edges at which it ends.
    """

    top: Boundary
    params: Sequence[Any]  # torch's stub allows no mixture
    retain_graph: bool
    layers: Mapping[int, Layer] = MappingProxyType({})
    bottom: Boundary = ()


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
        below: What arrives at each edge of the bottom, likewise.
    """

    tasks: int | slice
    grads: Sequence[Tensor | Product | None]
    below: Sequence[Tensor | None] = ()


Cotangents = Iterable[Cotangent]
RowStream = Iterator[Rows]
Crossing = Callable[[Segment, Cotangents], RowStream]


def pull(
    segment: Segment, cotangents: Sequence[Tensor | None], *, retain_graph: bool
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Take cotangents down to parameters and to the bottom, as ``torch.autograd.grad`` does.

    At the bottom the pass ends, wherever it lies: what arrives from above is returned as it is,
    and nothing goes on below, though one edge of the bottom may lead to another. To go on from
    there is what an ordinary pass would have done: hooks on tensors there run then, once.

    What is returned for an edge among the parameters, on the other hand, has been through the
    hooks on the tensor there; ``torch.autograd.grad`` leaves these out where it goes on below.

    Args:
        segment: A piece of the graph.
        cotangents: One per edge of the top; None where nothing arrives.
        retain_graph: Keep the graph.

    Returns:
        The gradients of the parameters, and what arrives at the bottom.
    """
    params, bottom = segment.params, segment.bottom
    present = [i for i, value in enumerate(cotangents) if value is not None]
    if not present:
        return [None] * len(params), [None] * len(bottom)
    caught: dict[int, Tensor | None] = {}

    def catch(i: int, grads: Sequence[Tensor | None]) -> None:
        caught[i] = grads[params[i].output_nr]  # comes after the hooks on the tensor

    edges = [(i, edge) for i, edge in enumerate(params) if isinstance(edge, GradientEdge)]
    hooks = [edge.node.register_prehook(partial(catch, i)) for i, edge in edges]
    ends = {edge.node: below for edge in bottom if (below := _below(edge.node)) is not None}
    hooks += [node.register_prehook(_stop) for node in ends]
    try:
        grads = torch.autograd.grad(
            [segment.top[i] for i in present],
            [*params, *bottom, *ends.values()],
            [cotangents[i] for i in present],
            retain_graph=retain_graph or bool(ends),
            allow_unused=True,
        )
    finally:
        for hook in hooks:
            hook.remove()
    first, last = len(params), len(params) + len(bottom)
    return [caught.get(i, grad) for i, grad in enumerate(grads[:first])], [*grads[first:last]]


def _stop(grads: Sequence[Tensor | None]) -> tuple[None, ...]:
    return (None,) * len(grads)


def _below(node: Node) -> GradientEdge | None:
    """Return an edge under a node: if it is wanted, too, hooks on the node's tensors wait."""
    if isinstance(node, BackwardCFunction):  # would take what is stopped for zeros, and compute
        return None
    return next((GradientEdge(child, i) for child, i in node.next_functions if child), None)
