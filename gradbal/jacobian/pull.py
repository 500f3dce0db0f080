"""What a crossing takes and gives."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from gradbal._utils.dtensor import own_part
from gradbal.graph.walk import Boundary
from gradbal.jacobian.layers import Layer
from gradbal.jacobian.unformed import Product


class Segment(NamedTuple):
    """A piece of the graph, from a boundary down to parameters.

    Attributes:
        top: Edges at which the cotangents arrive.
        params: Tensors, or edges of the graph, whose gradients are wanted.
        retain_graph: Whether the graph must survive the last task, too.
        layers: Tensors whose gradients need not be formed, by position.
        bottom: Edges at which it ends.
        hooked: Whether what arrives at the top has been through the hooks on the tensors there, or
            at which edges of the top it has.
        numbers: Of the parameters, among all of the optimizer.
        structure: What tells graphs apart that are made in another way.
        proof: Compares gradients that are not formed with formed ones; None for no comparison.
    """

    top: Boundary
    params: Sequence[Any]  # torch's stub allows no mixture
    retain_graph: bool
    layers: Mapping[int, Layer] = MappingProxyType({})
    bottom: Boundary = ()
    hooked: bool | Collection[GradientEdge] = True
    numbers: Sequence[int] = ()
    structure: object = None
    proof: Any = None


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


class Pulled(NamedTuple):
    """What a pass brought down.

    Attributes:
        grads: The gradients of the parameters.
        below: What arrives at the bottom.
    """

    grads: list[Tensor | None]
    below: list[Tensor | None]


def pull(segment: Segment, cotangents: Sequence[Tensor | None], *, last: bool = True) -> Pulled:
    """Take cotangents down to parameters and to the bottom, as ``torch.autograd.grad`` does.

    At the bottom the pass ends, wherever it lies: what arrives from above is returned as it is,
    and nothing goes on below, though one edge of the bottom may lead to another. Hooks on tensors
    there wait for the pass that goes on; what they do where it has been done above is undone.

    What is returned for an edge among the parameters, on the other hand, has been through the
    hooks on the tensor there; ``torch.autograd.grad`` leaves these out where it goes on below.

    Args:
        segment: A piece of the graph.
        cotangents: One per edge of the top; None where nothing arrives.
        last: Whether the graph may go; it stays if the segment says so, or has a bottom.
    """
    params, bottom = segment.params, segment.bottom
    top = [(e, c) for e, c in zip(segment.top, cotangents, strict=True) if c is not None]
    if not top:
        return Pulled([None] * len(params), [None] * len(bottom))
    caught: dict[int, Tensor | None] = {}

    def catch(i: int, grads: Sequence[Tensor | None]) -> None:
        caught[i] = grads[params[i].output_nr]  # comes after the hooks on the tensor

    def undo(i: int, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None] | None:
        edge, given = top[i]
        if grads[edge.output_nr] is given:
            return None
        return (*grads[: edge.output_nr], given, *grads[edge.output_nr + 1 :])

    hooks = [
        edge.node.register_prehook(partial(undo, i))
        for i, (edge, _) in enumerate(top)
        if _is_hooked(segment, edge) or isinstance(edge.node, BackwardCFunction)
    ]
    edges = [(i, edge) for i, edge in enumerate(params) if isinstance(edge, GradientEdge)]
    hooks += [edge.node.register_prehook(partial(catch, i)) for i, edge in edges]
    ends = {edge.node: below for edge in bottom if (below := _below(edge.node)) is not None}
    try:
        for stop in (_stop, _stop_with_zeros):
            stops = [node.register_prehook(stop) for node in ends]
            try:
                grads = torch.autograd.grad(
                    [edge for edge, _ in top],
                    [*params, *bottom, *ends.values()],
                    [cotangent for _, cotangent in top],
                    retain_graph=segment.retain_graph or not last or bool(ends),
                    allow_unused=True,
                )
                break
            except (AttributeError, TypeError):  # a user's hook under the bottom was given None
                if not ends or stop is _stop_with_zeros:
                    raise
            finally:
                for handle in stops:
                    handle.remove()
    finally:
        for hook in hooks:
            hook.remove()
    n, found = len(params), dict(enumerate(grads)) | caught
    if segment.hooked:  # an edge of the top that is wanted itself is not always passed
        given = {(e.node, e.output_nr): c for e, c in top if _is_hooked(segment, e)}
        found |= {i: given.get((e.node, e.output_nr), found[i]) for i, e in edges}
    held = [own_part(found[i], params[i]) for i in range(n)]
    return Pulled(held, [*grads[n : n + len(bottom)]])


def _stop(grads: Sequence[Tensor | None]) -> tuple[None, ...]:
    return (None,) * len(grads)


def _stop_with_zeros(grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Stop as well, for hooks that need a tensor; the node computes with zeros."""
    return tuple(None if grad is None else torch.zeros_like(grad) for grad in grads)


def _is_hooked(segment: Segment, edge: GradientEdge) -> bool:
    hooked = segment.hooked
    return hooked if isinstance(hooked, bool) else edge in hooked


def _below(node: Node) -> GradientEdge | None:
    """Return an edge under a node: if it is wanted, too, hooks on the node's tensors wait."""
    if isinstance(node, BackwardCFunction):  # would take what is stopped for zeros, and compute
        return None
    return next((GradientEdge(child, i) for child, i in node.next_functions if child), None)
