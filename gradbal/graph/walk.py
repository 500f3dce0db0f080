"""The recorded graph: its nodes in order, the tasks above each, and where regions are entered."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from gradbal._utils.torch_private import DDP_SINK, LEAF, output_metadata, saved, saves

Boundary = tuple[GradientEdge, ...]
Edge = tuple[Node | None, int]


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
        if not any(saves(kind, "sparse") for kind in self.kinds.values()):
            return set()
        embeddings = [node for node in self.order if saved(node, "sparse", False)]
        return {n for node in embeddings for n, _ in self.edges[node] if type(n) is LEAF}


def walk_graph(
    roots: Sequence[GradientEdge],
    numbers: Sequence[int],
    *,
    behind: bool = False,
    closed: Collection[Node] = (),
) -> Walk:
    """Visit every node under the roots and note the tasks above it.

    Args:
        roots: Where the losses stand.
        numbers: Of their tasks.
        behind: Look through nodes that only hand on what comes, for several tasks at once.
        closed: Nodes through which nobody goes on.
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
        below: Sequence[Edge] = () if node in closed else node.next_functions
        if behind:
            below = list(map(behind_sinks, below))
        if type(node) is DDP_SINK:
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


def unit_roundoff(nodes: Iterable[Node]) -> float:
    """Return the unit of roundoff of the narrowest dtype in which gradients pass some nodes."""
    dtypes = {output.dtype for node in nodes for output in output_metadata(node)}
    found = [torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point]
    return max(found, default=torch.finfo(torch.float64).eps) / 2


def several(tasks: int) -> bool:
    """Say whether a bit set has more than one member."""
    return tasks & (tasks - 1) != 0


def members(tasks: int) -> list[int]:
    """Return the members of a bit set, ascending."""
    return [task for task in range(tasks.bit_length()) if tasks >> task & 1]


def behind_sinks(edge: Edge) -> Edge:
    """Return the edge to which another leads through nodes that hand on what comes."""
    node, number = edge
    while node is not None and type(node) is DDP_SINK:
        node, number = node.next_functions[number]
    return node, number


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
