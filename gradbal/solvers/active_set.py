"""Active sets for quadratic programs over the non-negative orthant, on the host.

All violated signs change sides at once: fast and exact, but without guarantee. Whoever calls
checks the residual and has a safe method at hand.
"""

from operator import mul

import torch
from torch import Tensor

PATIENCE = 3  # rounds in which the number of exchanges may fail to fall
GATHER = 24  # from this size on, copying the free block out is cheaper than masking the rest


def exchange(
    hessian: Tensor, rows: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Solve ``min(z, H z + q) = 0`` for every ``q`` in ``rows``: points, residual, rounds."""
    free = rows < 0
    fewest, patience = free.numel() + 1, PATIENCE
    for n_iter in range(1, max_iter + 1):
        points = _solve_free(hessian, rows, free)
        slopes = torch.addmm(rows, points, hessian)
        residual = torch.minimum(points, slopes).abs().amax()
        if residual.item() <= tol or n_iter == max_iter:
            break
        previous, free = free, points > slopes
        changed = int((free ^ previous).sum().item())
        patience = PATIENCE if changed < fewest else patience - 1
        fewest = min(fewest, changed)
        if changed == 0 or patience == 0:
            break
    return points, residual, n_iter


def _solve_free(hessian: Tensor, rows: Tensor, free: Tensor) -> Tensor:
    """Solve ``(H z + q)[free] = 0`` with ``z = 0`` elsewhere; shape ``[k, m]``."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    targets = -rows * free
    if len(hessian) < GATHER:
        blocks = torch.where(free.unsqueeze(-1), hessian, eye)
        points: Tensor = torch.linalg.solve_ex(blocks, targets.unsqueeze(-1))[0].squeeze(-1)
        return points
    width = int(free.sum(-1).amax())
    index = free.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]
    blocks = hessian[index.unsqueeze(-1), index.unsqueeze(-2)]
    blocks = torch.where(free.gather(-1, index).unsqueeze(-1), blocks, eye[:width, :width])
    inner = torch.linalg.solve_ex(blocks, targets.gather(-1, index).unsqueeze(-1))[0]
    return torch.zeros_like(rows).scatter(-1, index, inner.squeeze(-1))


def exchange_numbers(
    matrix: list[list[float]], linear: list[float], tol: float
) -> tuple[list[float], float, int]:
    """Do the same for one ``q`` in plain numbers: faster than tensors for up to three tasks."""
    scale = max(map(abs, linear))
    free = [i for i, q in enumerate(linear) if q < 0]
    point, n_iter = [0.0] * len(linear), 0
    residual = 0.0 * sum(linear)  # NaN stays NaN
    while free:
        n_iter += 1
        point = eliminate(matrix, linear, free)
        slopes = [q + sum(map(mul, row, point)) for q, row in zip(linear, matrix, strict=True)]
        residual = max(map(abs, map(min, point, slopes))) / scale
        previous, free = free, [i for i in range(len(point)) if point[i] > slopes[i]]
        if residual <= tol or free == previous or n_iter > 2 * PATIENCE:
            break
    return point, residual, n_iter


def eliminate(matrix: list[list[float]], linear: list[float], free: list[int]) -> list[float]:
    """Solve on the free entries by elimination; entries without curvature left stay 0."""
    point = [0.0] * len(linear)
    table = [[matrix[i][j] for j in free] + [-linear[i]] for i in free]
    for k, pivot in enumerate(table):
        for row in table[k + 1 :]:
            factor = row[k] / pivot[k] if pivot[k] > 0 else 0.0
            row[k:] = [x - factor * p for x, p in zip(row[k:], pivot[k:], strict=True)]
    for k in reversed(range(len(free))):
        row = table[k]
        known = sum(row[j] * point[free[j]] for j in range(k + 1, len(free)))
        point[free[k]] = (row[-1] - known) / row[k] if row[k] > 0 else 0.0
    return point
