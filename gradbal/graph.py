"""The plan: which parameters the tasks share, and where their graphs meet."""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import Parameter
from torch.nn.parallel.distributed import _DDPSink

from gradbal.sharded import is_sharded

Boundary = tuple[GradientEdge, ...]
Edge = tuple[Node | None, int]
Place = tuple[int, int]  # which module, which of its outputs


class Marked(NamedTuple):
    """An edge at a module's output, and the tasks above it as a bit set."""

    edge: GradientEdge
    place: Place
    tasks: int


SINK = getattr(_DDPSink, "_backward_cls", None)  # what DDP hands its outputs through, as they are
LEAF = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)  # AccumulateGrad


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
        one_node: Whether one node, possibly compiled, stands for what several tasks do.
        hidden: Whether a reentrant checkpoint hides a part of the graph.
        apart: Whether no pass from a loss to the cut meets a node of another's.
        static: Whether DDP counts on one and the same backward pass in each step.
        sharded: Whether the parameters are those of ``fully_shard``, which the graph does not show.
        mixed: Whether several tasks use one leaf beside the region below the cut.
        peers: How many processes work together on one part of the batch.
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
    one_node: bool = False
    hidden: bool = False
    apart: bool = True
    static: bool = False
    sharded: bool = False
    mixed: bool = False
    peers: int = 1


@dataclass
class Walk:
    """The graph under the roots.

    Attributes:
        order: Every node after all nodes that use it.
        edges: What each node passes gradients to; a node None takes none.
        tasks: The roots above each node, as a bit set.
        users: How many edges lead to each node.
        sinks: Nodes that only hand on what comes, for several tasks at once.
    """

    order: list[Node]
    edges: dict[Node, Sequence[Edge]]
    tasks: dict[Node, int]
    users: dict[Node, int]
    sinks: list[Any] = field(default_factory=list)

    @cached_property
    def kinds(self) -> dict[str, type]:
        """The types of the nodes, by name."""
        return {kind.__name__: kind for kind in set(map(type, self.order))}

    def sparse_leaves(self) -> set[Node]:
        """Return the leaves used by an operation whose gradient is sparse."""
        if not any(hasattr(kind, "_saved_sparse") for kind in self.kinds.values()):
            return set()
        embeddings = [node for node in self.order if getattr(node, "_saved_sparse", False)]
        return {n for node in embeddings for n, _ in self.edges[node] if type(n) is LEAF}


def make_plan(
    roots: Sequence[GradientEdge],
    tasks: Sequence[int],
    index: Mapping[int, int],
    *,
    known: Mapping[int, int] = MappingProxyType({}),
    shared: Collection[int] | None = None,
    tag: Hashable = None,
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
    """
    walk = walk_graph(roots, tasks)
    sinks = walk.sinks
    if sinks:
        found = [_behind((root.node, root.output_nr)) for root in roots]
        roots = [GradientEdge(node, number) for node, number in found if node is not None]
        walk = walk_graph(roots, tasks, behind=True)
    marked = marked_edges(walk, tag)
    common = {node for node, above in walk.tasks.items() if above & (above - 1)}  # of several tasks
    region = {*common} if tag is None else nodes_below([edge.node for edge, *_ in marked], walk)
    entries = meeting_nodes(walk, region, {root.node for root in roots})
    cut = edges_into({node for node in entries if type(node) is not LEAF}, walk, roots, region)
    compiled = [e.node for e in cut if type(e.node).__name__ == "CompiledFunctionBackward"]
    plan = Plan(
        roots=list(roots),
        tasks=list(tasks),
        own=[[] for _ in roots],
        above=[[] for _ in roots],
        cut=cut,
        marked=marked,
        one_node=any(several(walk.tasks[root.node]) for root in roots)
        or len({*compiled}) < len(compiled),  # several outputs; one is a compiled trunk's
        hidden="CheckpointFunctionBackward" in walk.kinds,
        apart=common <= region and not sinks,
        static=any(sink.ddp_weakref().static_graph for sink in sinks),
    )
    position, sparse = {task: i for i, task in enumerate(tasks)}, walk.sparse_leaves()
    for node in walk.order:
        if type(node) is not LEAF:
            continue
        variable = node.variable  # type: ignore[attr-defined]  # of AccumulateGrad
        if type(variable) is not Parameter and is_sharded(variable):
            plan.peers = max(plan.peers, variable.device_mesh.size())
        plan.mixed |= node in common and (node not in region or node in entries)
        number = index.get(id(variable))
        if number is None:
            plan.foreign += 1
            continue
        reached = plan.reached[number] = walk.tasks[node]
        if node in sparse:
            plan.sparse.add(number)
        ever = reached | known.get(number, 0)
        is_shared = several(ever) if shared is None else number in shared
        if is_shared and node in region and node not in entries:
            plan.trunk.append(number)
        else:
            place = plan.above if is_shared else plan.own
            plan.apart &= node not in region or node in entries
            for task in members(reached):
                place[position[task]].append(number)
    return plan


def several(tasks: int) -> bool:
    """Say whether a bit set has more than one member."""
    return tasks & (tasks - 1) != 0


def members(tasks: int) -> list[int]:
    """Return the members of a bit set, ascending."""
    return [task for task in range(tasks.bit_length()) if tasks >> task & 1]


def walk_graph(
    roots: Sequence[GradientEdge], numbers: Sequence[int], *, behind: bool = False
) -> Walk:
    """Visit every node under the roots and note the tasks above it.

    Args:
        roots: Where the losses stand.
        numbers: Of their tasks.
        behind: Look through nodes that only hand on what comes, for several tasks at once.
    """
    tasks = dict.fromkeys((root.node for root in roots), 0)
    for number, root in zip(numbers, roots, strict=True):
        tasks[root.node] |= 1 << number
    users = dict.fromkeys(tasks, 0)
    edges: dict[Node, Sequence[Edge]] = {}
    stack = list(tasks)
    sinks: list[Any] = []
    while stack:
        node = stack.pop()
        below: Sequence[Edge] = node.next_functions
        if behind:
            below = list(map(_behind, below))
        if type(node) is SINK:
            sinks.append(node)
        edges[node] = below
        for child, _ in below:
            if child in users:
                users[child] += 1
            elif child is not None:
                users[child] = 1
                stack.append(child)
    order: list[Node] = []
    left = users.copy()
    stack = [node for node in tasks if not left[node]]
    while stack:
        node = stack.pop()
        order.append(node)
        above = tasks[node]
        for child, _ in edges[node]:
            if child is not None:
                tasks[child] = tasks.get(child, 0) | above
                left[child] -= 1
                if not left[child]:
                    stack.append(child)
    return Walk(order, edges, tasks, users, sinks)


def _behind(edge: Edge) -> Edge:
    """Return the edge to which another leads through nodes that hand on what comes."""
    node, number = edge
    while node is not None and type(node) is SINK:
        node, number = node.next_functions[number]
    return node, number


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


def made_of_parameters(edge: GradientEdge) -> bool:
    """Say whether what stands at an edge is one parameter, seen through operations of its own."""
    node: Node | None = edge.node
    while node is not None and type(node) is not LEAF:
        children = [child for child, _ in node.next_functions if child is not None]
        node = children[0] if len(children) == 1 else None
    return node is not None


def nodes_below(tops: Sequence[Node], walk: Walk) -> set[Node]:
    """Return the nodes given and everything they depend on."""
    found: set[Node] = set()
    stack = list(tops)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(child for child, _ in walk.edges[node] if child is not None)
    return found


def meeting_nodes(walk: Walk, region: set[Node], tops: set[Node]) -> set[Node]:
    """Find the nodes where a region is entered, after making it smaller where it must be.

    While an entrance lies below another node of the region, everything from which it can be
    reached is taken out, so that in the end no entrance lies below another and each path from a
    loss enters once.

    Args:
        walk: The graph.
        region: Nodes, with everything below them; what is taken out leaves this set, too.
        tops: Nodes of the losses, entered from outside.
    """
    above = [node for node in walk.order if node not in region]
    entered = Counter(child for node in above for child, _ in walk.edges[node] if child in region)
    entries = (tops & region).union(entered)
    if all(walk.users[node] == entered[node] for node in entries):
        return entries
    users: dict[Node, list[Node]] = {}
    for node in region:
        for child, _ in walk.edges[node]:
            if child is not None:
                users.setdefault(child, []).append(node)
    outside: set[Node] = set()
    queue = list(entries)
    while queue:
        stack = list(users.get(queue.pop(), ()))
        while stack:
            node = stack.pop()
            if node in outside:
                continue
            outside.add(node)
            entries.discard(node)
            stack.extend(users.get(node, ()))
            for child, _ in walk.edges[node]:
                if child is not None and child not in outside and child not in entries:
                    entries.add(child)
                    queue.append(child)
    region -= outside
    return entries


def edges_into(
    nodes: set[Node], walk: Walk, roots: Sequence[GradientEdge], region: set[Node]
) -> Boundary:
    """Return every edge that leads from outside a region into one of the nodes, each once."""
    found = {(root.node, root.output_nr): None for root in roots if root.node in nodes}
    for node in walk.order if nodes else ():
        if node not in region:
            found.update(((n, i), None) for n, i in walk.edges[node] if n in nodes)
    return tuple(GradientEdge(node, number) for node, number in found)
