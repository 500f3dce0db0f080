"""The plan of a step: which parameters are heads, which the trunk, and where the graphs meet."""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter

from gradbal._utils.dtensor import is_sharded
from gradbal._utils.torch_private import LEAF
from gradbal.graph.routing import Routing, route
from gradbal.graph.walk import (
    Boundary,
    Walk,
    behind_sinks,
    edges_into,
    meeting_nodes,
    members,
    nodes_below,
    several,
    walk_graph,
)

COMPILED = "CompiledFunctionBackward"
Place = tuple[int, int]  # which module, which of its outputs


class Marked(NamedTuple):
    """An edge at a module's output, and the tasks above it as a bit set."""

    edge: GradientEdge
    place: Place
    tasks: int


@dataclass
class Plan:
    """What one batch of losses asks of the recorded graph; tasks are numbered as given.

    Attributes:
        roots: Where each task's loss stands in the graph.
        tasks: The number of each task.
        own: Per task, the parameters that are its alone.
        above: Per task, the shared parameters that it reaches beside the trunk.
        cut: Edges where the tasks' graphs meet; none lies below another.
        trunk: Shared parameters below the cut.
        marked: Edges that were marked with the tag.
        reached: The tasks that reach each parameter in this graph, as a bit set.
        sparse: Parameters whose gradients come out sparse.
        foreign: How many reached parameters belong to no group of the optimizer.
        opaque: Whether one compiled graph stands for what several tasks do.
        within: Pairs of tasks of which the first one's loss is a part of the second one's.
        hidden: Whether a reentrant checkpoint hides a part of the graph.
        apart: Whether no pass from a loss to the cut meets a node of another's.
        static: Whether DDP counts on one and the same backward pass in each step.
        sharded: Whether the parameters are those of ``fully_shard``, which the graph does not show.
        mixed: Whether several tasks use one leaf beside the region below the cut.
        peers: How many processes work together on one part of the batch.
        nodes: Every node of the graph.
        roundoff: Unit of roundoff of the narrowest dtype in the graph; autocast makes one.
        unresolved: Kinds of operations whose results single tasks read in parts, and through which
            it cannot be seen what they read.
    """

    roots: list[GradientEdge]
    tasks: list[int]
    own: list[list[int]]
    above: list[list[int]]
    cut: Boundary
    trunk: list[int] = field(default_factory=list)
    marked: list[Marked] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)
    sparse: set[int] = field(default_factory=set)
    foreign: int = 0
    opaque: bool = False
    within: list[tuple[int, int]] = field(default_factory=list)
    hidden: bool = False
    apart: bool = True
    static: bool = False
    sharded: bool = False
    mixed: bool = False
    peers: int = 1
    nodes: Sequence[Node] = ()
    roundoff: float = torch.finfo(torch.float64).eps / 2
    unresolved: set[str] = field(default_factory=set)


def make_plan(
    roots: Sequence[GradientEdge],
    tasks: Sequence[int],
    index: Mapping[int, int],
    *,
    known: Mapping[int, int] = MappingProxyType({}),
    shared: Collection[int] | None = None,
    tag: Hashable = None,
    helps: dict[tuple[int, ...], bool] | None = None,
) -> Plan:
    """Find heads, cut and trunk.

    A parameter is a leaf of the graph that the optimizer knows. It is shared if several tasks
    reach it, now or in an earlier step.

    Args:
        roots: Where each present task's loss stands.
        tasks: The number of each of these tasks.
        index: Number of each parameter of the optimizer, by ``id``.
        known: The tasks that reached a parameter in earlier steps, as a bit set.
        shared: Numbers of the parameters to treat as shared; None to find them.
        tag: The cut is to be at the edges that were marked with this key, see :func:`mark`;
            None for where the tasks' graphs meet.
        helps: Whether it makes a difference to follow what tasks read, by size of the graph and
            tasks; filled in here. None to forget it.
    """
    helps = {} if helps is None else helps
    walk = walk_graph(roots, tasks)
    sinks = walk.sinks
    if sinks:
        found = [behind_sinks((root.node, root.output_nr)) for root in roots]
        roots = [GradientEdge(node, number) for node, number in found if node is not None]
        walk = replace(walk_graph(roots, tasks, behind=True), sinks=sinks)

    def planned(walk: Walk, routing: Routing) -> Plan:
        return _planned(walk, roots, tasks, routing, index, known, shared, tag)

    size = len(walk.order), *tasks
    routing = route(walk, dict(zip(tasks, roots, strict=True))) if helps.get(size, True) else None
    if routing is None:
        helps.setdefault(size, False)
        return planned(walk, Routing())
    if not routing.region:
        helps[size] = False
        return planned(walk, routing)
    numbers = [*tasks, *(task for task, edges in routing.lower.items() for _ in edges)]
    tops = [*roots, *(edge for edges in routing.lower.values() for edge in edges)]
    routed = walk_graph(tops, numbers, behind=bool(sinks), closed=routing.region)
    plan = planned(replace(routed, sinks=sinks), routing)
    if size not in helps:
        plain = planned(walk, Routing(unresolved=routing.unresolved))
        helps[size] = (plain.own, plain.above, plain.trunk) != (plan.own, plan.above, plan.trunk)
        return plan if helps[size] else plain
    return plan


def _planned(
    walk: Walk,
    roots: Sequence[GradientEdge],
    tasks: Sequence[int],
    routing: Routing,
    index: Mapping[int, int],
    known: Mapping[int, int],
    shared: Collection[int] | None,
    tag: Hashable,
) -> Plan:
    """Plan along a walk that leaves a packed region where its tasks do."""
    packed, sinks = routing.region, walk.sinks
    tops = [*roots, *(edge for edges in routing.lower.values() for edge in edges)]
    marked = marked_edges(walk, tag)
    common = {n for n, above in walk.tasks.items() if above & (above - 1)} - packed
    region = {*common} if tag is None else nodes_below([edge.node for edge, *_ in marked], walk)
    entries = meeting_nodes(walk, region, {top.node for top in tops} - packed)
    cut = edges_into({node for node in entries if type(node) is not LEAF}, walk, tops, region)
    plan = Plan(
        roots=list(roots),
        tasks=list(tasks),
        own=[[] for _ in roots],
        above=[[] for _ in roots],
        cut=cut,
        marked=marked,
        opaque=COMPILED in walk.kinds and _is_opaque(roots, cut, common),
        within=_within(roots, tasks, walk, packed),
        hidden="CheckpointFunctionBackward" in walk.kinds,
        apart=common <= region and not sinks and not packed,
        static=any(sink.ddp_weakref().static_graph for sink in sinks),
        nodes=walk.order,
        unresolved=routing.unresolved,
    )

    def shares(number: int, reached: int) -> bool:
        return several(reached | known.get(number, 0)) if shared is None else number in shared

    _place_leaves(plan, walk, index, shares, region - entries)
    return plan


def _is_opaque(roots: Sequence[GradientEdge], cut: Boundary, common: set[Node]) -> bool:
    """Say whether a compiled graph makes several of the tensors in which tasks meet, or losses.

    One that makes a single one is a compiled trunk.
    """
    made = [edge.node for edge in cut if type(edge.node).__name__ == COMPILED]
    losses = [root.node for root in roots if root.node in common]
    return len({*made}) < len(made) or any(type(node).__name__ == COMPILED for node in losses)


def _within(
    roots: Sequence[GradientEdge], tasks: Sequence[int], walk: Walk, packed: Collection[Node]
) -> list[tuple[int, int]]:
    """Return pairs of tasks of which the first one's loss is a part of the second one's."""
    found = []
    for i, root in enumerate(roots):
        if root.node in packed or type(root.node).__name__ == COMPILED:
            continue
        for other in members(walk.tasks[root.node] & ~(1 << tasks[i])):
            at = roots[tasks.index(other)]
            if at.node is not root.node or (at.output_nr == root.output_nr and other > tasks[i]):
                found.append((tasks[i], other))
    return found


def _place_leaves(
    plan: Plan,
    walk: Walk,
    index: Mapping[int, int],
    shares: Callable[[int, int], bool],
    below: set[Node],
) -> None:
    """Say of each parameter whether it is a task's own, above the cut or in the trunk.

    Args:
        plan: Where to note it.
        walk: The graph.
        index: Number of each parameter of the optimizer, by ``id``.
        shares: Says whether a parameter is shared, given its number and the tasks that reach it.
        below: The nodes below the cut.
    """
    position, sparse = {task: i for i, task in enumerate(plan.tasks)}, walk.sparse_leaves()
    for node in walk.order:
        if type(node) is not LEAF:
            continue
        variable = node.variable  # type: ignore[attr-defined]  # of AccumulateGrad
        if type(variable) is not Parameter and is_sharded(variable):
            plan.peers = max(plan.peers, variable.device_mesh.size())
        plan.mixed |= node not in below and several(walk.tasks[node])
        number = index.get(id(variable))
        if number is None:
            plan.foreign += 1
            continue
        reached = plan.reached[number] = walk.tasks[node]
        if node in sparse:
            plan.sparse.add(number)
        is_shared = shares(number, reached)
        if is_shared and node in below:
            plan.trunk.append(number)
        else:
            place = plan.above if is_shared else plan.own
            plan.apart &= node not in below
            for task in members(reached):
                place[position[task]].append(number)


def mark(output: object, tag: Hashable, module: int) -> None:
    """Mark the graph where a module's output stands; the mark lives and dies with the graph."""
    for number, tensor in enumerate(tensors_in(output)):
        if tensor.requires_grad:
            edge = get_gradient_edge(tensor)
            _metadata(edge.node).setdefault(tag, {})[edge.output_nr] = (module, number)


def tensors_in(tree: object) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return [tensor for branch in tree for tensor in tensors_in(branch)]
    return []


def _metadata(node: Node) -> dict[Hashable, dict[int, Place]]:
    """Return the dict that every node carries (torch's stub calls it a method)."""
    return node.metadata  # type: ignore[return-value]


def marked_edges(walk: Walk, tag: Hashable) -> list[Marked]:
    """Return the marked edges in the graph, in the order of the walk."""
    if tag is None:
        return []
    return [
        Marked(GradientEdge(node, output), place, walk.tasks[node])
        for node in walk.order
        for output, place in _metadata(node).get(tag, {}).items()
    ]
