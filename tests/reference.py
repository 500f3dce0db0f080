"""Slow, obvious versions, on the vectors themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

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
