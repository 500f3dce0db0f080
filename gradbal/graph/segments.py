"""The trunk in pieces, so that only one at a time has task gradients in memory."""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node

from gradbal._utils.torch_private import LEAF, order_of_creation
from gradbal.graph.cost import entries_at
from gradbal.graph.walk import Boundary

Open = dict[Node, set[int]]  # edges that lead out of what has been visited, by where they lead


class Piece(NamedTuple):
    """A part of the trunk.

    Attributes:
        top: Edges at which cotangents arrive.
        bottom: Edges at which it ends, the top of the next piece.
        params: Numbers of the parameters whose gradients are complete within it.
    """

    top: Boundary
    bottom: Boundary
    params: list[int]


class Place(NamedTuple):
    """Where the trunk may be cut: entries on the edges there, entries and parameters above."""

    width: int
    size: int
    n_params: int
    edges: Boundary


def split(
    top: Boundary, index: Mapping[int, int], sizes: Mapping[int, int], limit: float
) -> list[Piece]:
    """Cut the trunk where little crosses the cut.

    Args:
        top: Where the trunk begins.
        index: Number of each parameter, by ``id``.
        sizes: Numbers of entries of the parameters that count, by number.
        limit: Number of entries that a piece should not exceed.

    Returns:
        From the top down to the last of these parameters.
    """
    pieces: list[Piece] = []
    params: list[int] = []
    size, left, best = 0, set(sizes), None
    for leaves, opened in _sweep(top):
        done = [n for leaf in leaves if (n := index.get(id(leaf.variable))) in left]
        more = sum(sizes[number] for number in done)
        if best is not None and size + more > limit:
            pieces.append(Piece(top, best.edges, params[: best.n_params]))
            top, params, size, best = best.edges, params[best.n_params :], size - best.size, None
        params += done
        size += more
        left.difference_update(done)
        if not left:
            break
        if params and _may_end(opened):
            edges = tuple(GradientEdge(n, i) for n, outputs in opened.items() for i in outputs)
            width = entries_at(edges)
            if best is None or width <= best.width or best.size < limit / 4:
                best = Place(width, size, len(params), edges)
    return [*pieces, Piece(top, (), params)]


def _sweep(top: Boundary) -> Iterator[tuple[list[Any], Open]]:
    """Visit each node after all nodes that use it, the last one recorded first.

    Yields:
        The leaves of which no more uses follow, and the edges from what has been visited to the
        rest.
    """
    opened: Open = {}
    for edge in top:
        opened.setdefault(edge.node, set()).add(edge.output_nr)
    users, stack = Counter[Node](), list(opened)
    seen = set(stack)
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None:
                users[child] += 1
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    turn = count()
    ready = [(-order_of_creation(node), next(turn), node) for node in opened if not users[node]]
    heapq.heapify(ready)
    while ready:
        *_, node = heapq.heappop(ready)
        opened.pop(node)
        leaves = []
        for child, output in node.next_functions:
            if child is None:
                continue
            opened.setdefault(child, set()).add(output)
            users[child] -= 1
            if not users[child] and type(child) is LEAF:
                opened.pop(child)
                leaves.append(child)
            elif not users[child]:
                heapq.heappush(ready, (-order_of_creation(child), next(turn), child))
        yield leaves, opened


def _may_end(opened: Open) -> bool:
    """Say whether passes can end here: a custom function under which others lie would compute."""
    return len(opened) == 1 or not any(isinstance(node, BackwardCFunction) for node in opened)
