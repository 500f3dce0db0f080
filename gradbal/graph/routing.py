"""Which entries of a packed tensor each loss reads: outputs or losses joined and taken apart.

Heads whose outputs are joined by ``cat`` or ``stack``, and losses packed into one tensor, seem to
be used by every task. So a mask of what a task reads is sent down by calling the recorded nodes
themselves, for as long as the task reads a part only: the entries of a result that are not zero
are those that it reads there. A node that is called so runs its formula, but no hook, and nothing
is freed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from gradbal._utils.torch_private import output_metadata
from gradbal.graph.walk import Walk, made_of_parameters, members, several

# Nodes that read a part of what is packed, where a task's mask begins.
PARTIAL = {
    *("SelectBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0"),
    *("UnbindBackward0", "UnsafeSplitBackward0", "IndexBackward0", "IndexSelectBackward0"),
    *("GatherBackward0", "TakeBackward0", "MaskedSelectBackward0", "DiagonalBackward0"),
    *("AsStridedBackward0", "WhereBackward0", "MaskedFillBackward0", "MulBackward0"),
}
DIVIDING = {  # those with an output for each part
    *("SplitBackward0", "SplitWithSizesBackward0", "UnbindBackward0", "UnsafeSplitBackward0"),
}
# Nodes that move or drop entries: called with a mask.
MOVING = {
    *PARTIAL,
    *("CatBackward0", "StackBackward0", "ViewBackward0", "UnsafeViewBackward0"),
    *("ReshapeAliasBackward0", "ExpandBackward0", "RepeatBackward0", "PermuteBackward0"),
    *("TransposeBackward0", "TBackward0", "SqueezeBackward0", "SqueezeBackward1"),
    *("SqueezeBackward2", "SqueezeBackward3", "UnsqueezeBackward0", "AliasBackward0"),
    *("FlipBackward0", "RollBackward0", "CopySlices", "IndexPutBackward0", "ScatterBackward0"),
    *("SelectScatterBackward0", "SliceScatterBackward0", "ConstantPadNdBackward0"),
    *("MovedimBackward0", "UnfoldBackward0", "SumBackward0", "SumBackward1"),
    *("MeanBackward0", "MeanBackward1"),
}
# Nodes that work entry by entry: a mask stays as it is.
ELEMENTWISE = {
    *("AddBackward0", "SubBackward0", "DivBackward0", "NegBackward0", "CloneBackward0"),
    *("ToCopyBackward0", "CopyBackwards", "TanhBackward0", "SigmoidBackward0", "ReluBackward0"),
    *("LeakyReluBackward0", "EluBackward0", "GeluBackward0", "SiluBackward0", "SoftplusBackward0"),
    *("ExpBackward0", "LogBackward0", "Log1PBackward0", "SqrtBackward0", "RsqrtBackward0"),
    *("AbsBackward0", "ClampBackward0", "ClampBackward1", "ClampMinBackward0"),
    *("ClampMaxBackward0", "HardtanhBackward0", "LogSigmoidBackward0", "ThresholdBackward0"),
    *("PowBackward0", "PowBackward1", "ReciprocalBackward0", "SquareBackward0", "SinBackward0"),
    *("CosBackward0", "NativeDropoutBackward0", "MseLossBackward0", "L1LossBackward0"),
    *("SmoothL1LossBackward0", "HuberLossBackward0", "BinaryCrossEntropyBackward0"),
    *("BinaryCrossEntropyWithLogitsBackward0", "MaximumBackward0", "MinimumBackward0"),
    *("NanToNumBackward0",),
}

SENT = MOVING | ELEMENTWISE
Read = Tensor | bool  # a mask on the CPU, or True for all entries and False for none


@dataclass
class Routing:
    """Where the tasks come out of a packed region.

    Attributes:
        region: Its nodes.
        lower: Per task, the edges under it behind which the task reads something.
        unresolved: Kinds of nodes whose parts are read by single tasks and that are not understood.
    """

    region: set[Node] = field(default_factory=set)
    lower: dict[int, list[GradientEdge]] = field(default_factory=dict)
    unresolved: set[str] = field(default_factory=set)


def route(walk: Walk, roots: Mapping[int, GradientEdge]) -> Routing | None:
    """Follow what each task reads through nodes that several tasks share.

    Args:
        walk: The graph.
        roots: Where each task's loss stands, by the number of the task.

    Returns:
        None if no task reads a part of anything that several tasks share.
    """
    kinds = tuple(kind for name, kind in walk.kinds.items() if name in PARTIAL)
    packed = [task for task, root in roots.items() if several(walk.tasks[root.node])]
    if not kinds and not packed:
        return None
    leading = _leading(walk)
    if not packed and not any(
        isinstance(node, kinds) and (node in leading or type(node).__name__ in DIVIDING)
        for node in walk.order
    ):
        return None
    reads: dict[Node, dict[int, list[Read]]] = {}
    routing = Routing(lower={task: [] for task in roots})

    def deliver(edge: GradientEdge, task: int, read: Read) -> None:
        node, number = edge.node, edge.output_nr
        if read is not False and (several(walk.tasks[node]) or node in leading):
            nothing: list[Read] = [False] * len(output_metadata(node))
            there = reads.setdefault(node, {}).setdefault(task, nothing)
            there[number] = _either(there[number], read)

    for task in packed:
        deliver(roots[task], task, True)
    for node in walk.order:
        here = reads.get(node, {})
        if len(here) > 1 and _in_parts(here):
            if _is_routable(node, walk):
                routing.region.add(node)
                for task, outputs in here.items():
                    for edge, read in _below(node, walk, outputs):
                        deliver(edge, task, read)
                        if read is not False:
                            routing.lower[task].append(edge)
                continue
            routing.unresolved.add(type(node).__name__)
        tasks = [*here] if several(walk.tasks[node]) else members(walk.tasks[node])
        if len(tasks) == 1 and (node in leading or (here and _is_routable(node, walk))):
            outputs = here.get(tasks[0], [True] * len(output_metadata(node)))
            if type(node).__name__ in PARTIAL or any(read is not True for read in outputs):
                for edge, read in _below(node, walk, outputs):
                    deliver(edge, tasks[0], read)
                continue
        for edge in _edges(node, walk):
            for task in tasks:
                deliver(edge, task, True)
    for edges in routing.lower.values():
        edges[:] = dict.fromkeys(edge for edge in edges if edge.node not in routing.region)
    return routing if routing.region or routing.unresolved else None


def _leading(walk: Walk) -> set[Node]:
    """Return the nodes of single tasks from which masks can be sent to nodes of several."""
    found: set[Node] = set()
    for node in reversed(walk.order):
        if type(node).__name__ not in SENT or several(walk.tasks[node]):
            continue
        children = [child for child, _ in walk.edges[node] if child is not None]
        leads = any(child in found or several(walk.tasks[child]) for child in children)
        if leads and _is_routable(node, walk):
            found.add(node)
    return found


def _edges(node: Node, walk: Walk) -> list[GradientEdge]:
    return [GradientEdge(child, i) for child, i in walk.edges[node] if child is not None]


def _is_routable(node: Node, walk: Walk) -> bool:
    """Say whether masks can be sent through a node: it has no parameters, and is understood."""
    if type(node).__name__ not in SENT:
        return False
    return not any(made_of_parameters(edge) for edge in _edges(node, walk))


def _in_parts(given: Mapping[int, Sequence[Read]]) -> bool:
    """Say whether some task reads a part only."""
    return any(read is not True for outputs in given.values() for read in outputs)


def _either(a: Read, b: Read) -> Read:
    """Return what is read by one or the other."""
    if a is True or b is True:
        return True
    if a is False or b is False:
        return b if a is False else a
    return _shortened(torch.maximum(a, b))


def _shortened(mask: Tensor) -> Read:
    """Return True or False for a mask that is the same everywhere."""
    if not mask.numel() or not mask.any():
        return False
    return True if mask.all() else mask


def _below(node: Node, walk: Walk, outputs: Sequence[Read]) -> Iterator[tuple[GradientEdge, Read]]:
    """Yield the edges under a node, and what is read there if this is read of its outputs."""
    edges = walk.edges[node]
    two = sum(child is not None for child, _ in edges) > 1
    if type(node).__name__ in ELEMENTWISE or (type(node).__name__ == "MulBackward0" and two):
        found: Sequence[Any] = [_dense(outputs[0], node, 0)] * len(edges)
    else:
        found = _called(node, [_dense(read, node, i) for i, read in enumerate(outputs)])
    if len(found) != len(edges):
        found = [None] * len(edges) if not found else [True] * len(edges)
    for (child, number), mask in zip(edges, found, strict=True):
        if child is not None:
            yield GradientEdge(child, number), _fitted(mask, output_metadata(child)[number].shape)


def _dense(read: Read, node: Node, number: int) -> Tensor:
    """Return a mask in the shape and dtype of one of a node's outputs."""
    like = output_metadata(node)[number]
    if isinstance(read, Tensor):
        return read.to(like.dtype)
    return torch.full(tuple(like.shape), float(read), dtype=like.dtype)


def _called(node: Node, masks: Sequence[Tensor]) -> Sequence[Any]:
    """Call a node with masks, on the CPU if it will have it; True for all if it fails."""
    devices = dict.fromkeys([torch.device("cpu"), output_metadata(node)[0].device])
    for device in devices:
        try:
            found: Any = node(*(mask.to(device) for mask in masks))  # type: ignore[operator]
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        parts = found if isinstance(found, tuple) else (found,)
        return [part.cpu() if isinstance(part, Tensor) else part for part in parts]
    return [True] * len(node.next_functions)


def _fitted(mask: Any, shape: Sequence[int]) -> Read:
    """Return what is not zero of a mask, in a shape that may have been broadcast to it."""
    if not isinstance(mask, Tensor):
        return bool(mask)
    mask = (mask.to_dense() != 0).float()
    if mask.shape == torch.Size(shape):
        return _shortened(mask)
    try:
        return _shortened((mask.sum_to_size(*shape) != 0).float())
    except RuntimeError:
        return True
