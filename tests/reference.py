"""Slow, obvious versions, on the vectors themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

Orders = Sequence[Sequence[int]]  # for each task whom it visits, in turn


def pcgrad(jacobian: Tensor, orders: Orders) -> Tensor:
    total = torch.zeros_like(jacobian[0])
    for own, order in zip(jacobian, orders, strict=True):
        projected = own.clone()
        for j in order:
            other = jacobian[j]
            if projected @ other < 0:
                projected = projected - (projected @ other) / (other @ other) * other
        total = total + projected
    return total


def gradvac(
    jacobian: Tensor, orders: Orders, targets: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the direction and the new targets; every correction is checked to reach its target."""
    total, targets = torch.zeros_like(jacobian[0]), targets.clone()
    for i, order in enumerate(orders):
        own = jacobian[i].clone()
        for j in order:
            other, target = jacobian[j], targets[i, j].clone()
            cosine = _cosine(own, other)
            if cosine < target:
                amount = own.norm() * (
                    target * (1 - cosine**2).sqrt() - cosine * (1 - target**2).sqrt()
                )
                own = own + amount / (other.norm() * (1 - target**2).sqrt()) * other
                assert (_cosine(own, other) - target).abs() < 1e-12
            targets[i, j] = (1 - beta) * target + beta * cosine
        total = total + own
    return total, targets


def shares(jacobian: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit gradients, norms, and the weights on the unit gradients brought to sum 1."""
    norms = jacobian.norm(dim=1)
    lengths = weights * norms
    return jacobian / norms[:, None], norms, lengths / lengths.abs().sum()


def min_norm_residual(jacobian: Tensor, weights: Tensor) -> float:
    r"""How far every task is from :math:`g_i d \ge d^2`, with equality where it has weight."""
    units, norms, lengths = shares(jacobian, weights)
    near = norms.min() / norms
    direction = units.T @ lengths
    level = direction @ direction / (near @ lengths)
    return _violation(lengths, units @ direction - level * near)


def projection_residual(jacobian: Tensor, preferences: Tensor, weights: Tensor) -> float:
    r"""How far the weights are from those of a projection of gradients on the dual cone."""
    units, norms, _ = shares(jacobian, weights)
    size = (preferences * norms).max()
    added = (weights - preferences) * norms / size
    return _violation(added, units @ (jacobian.T @ weights) / size)


def cagrad_residual(jacobian: Tensor, weights: Tensor, c: float) -> float:
    r"""How far the direction, not rescaled, is from the best for the worst task in its ball."""
    m = len(jacobian)
    mean, direction = jacobian.mean(dim=0), jacobian.T @ weights
    units, norms, lengths = shares(jacobian, weights - 1 / m)
    gains = units @ direction / direction.norm()
    slack = gains - (gains * norms).min() / norms
    length = (direction - mean).norm() / mean.norm()
    return max(_violation(lengths, slack), abs(length.item() / c - 1))


def nash_residual(
    jacobian: Tensor, weights: Tensor, alpha: float = 1.0, demand: Tensor | float = 1.0
) -> float:
    gains = jacobian @ (jacobian.T @ weights)
    return ((weights / demand) ** (1 / alpha) * gains - 1).abs().max().item()


def _violation(points: Tensor, slopes: Tensor) -> float:
    """Both must be non-negative, and one of them zero."""
    return torch.minimum(points, slopes).abs().max().item()


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / a.norm() / b.norm()


@dataclass
class Parts:
    """The parts of a plan that decide what is computed."""

    cut: set[tuple[Node, int]]
    trunk: list[int]
    own: list[list[int]]
    above: list[list[int]]
    reached: dict[int, int]
    apart: bool
    foreign: int


def below(node: Node) -> set[Node]:
    """Return a node and everything it depends on."""
    found, stack = {node}, [node]
    while stack:
        new = {child for child, _ in stack.pop().next_functions if child is not None} - found
        found |= new
        stack += new
    return found


def plan_parts(
    roots: Sequence[GradientEdge],
    tasks: Sequence[int],
    index: Mapping[int, int],
    top: Node | None = None,
) -> Parts:
    """Plan by asking of every node, again and again, what it reaches.

    Args:
        roots: Where the losses stand.
        tasks: Their numbers.
        index: Number of each parameter, by ``id``.
        top: A node below which the trunk lies; None for where the graphs meet.
    """
    under = {task: below(root.node) for task, root in zip(tasks, roots, strict=True)}
    nodes = set().union(*under.values())
    reach = {node: below(node) - {node} for node in nodes}
    above = {n: sum(1 << task for task in tasks if n in under[task]) for n in nodes}
    edges = {(node, edge) for node in nodes for edge in node.next_functions if edge[0] is not None}
    edges |= {(None, (root.node, root.output_nr)) for root in roots}
    common = {node for node in nodes if above[node].bit_count() > 1}
    region = common if top is None else below(top) & nodes if top in nodes else set()
    while True:
        entries = {edge[0] for user, edge in edges if edge[0] in region and user not in region}
        nested = {node for node in region if reach[node] & entries}
        if not nested:
            break
        region = region - nested
    leaves = {node for node in nodes if hasattr(node, "variable")}
    number = {n: index[id(n.variable)] for n in leaves if id(n.variable) in index}
    trunk = {n for n in number if n in common and n in region - entries}
    rest = number.keys() - trunk
    return Parts(
        cut={edge for user, edge in edges if edge[0] in entries - leaves and user not in region},
        trunk=sorted(number[n] for n in trunk),
        own=[sorted(number[n] for n in rest - common if n in under[task]) for task in tasks],
        above=[sorted(number[n] for n in rest & common if n in under[task]) for task in tasks],
        reached={number[n]: above[n] for n in number},
        apart=common <= region and not rest & (region - entries),
        foreign=len(leaves) - len(number),
    )
