"""Quadratic programs over the non-negative orthant, many right-hand sides at once."""

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.active_set import exchange, exchange_numbers
from gradbal.solvers.interior_point import (
    ENUMERATED,
    best_support,
    interior_point,
    natural_residual,
)
from gradbal.solvers.solution import Solution

_FEW = 3  # up to this size plain numbers are faster than tensors
_SOME = 16  # for one right-hand side also up to this one, if few of its entries are negative
_TINY = 1e-300


def nonnegative_qp(
    hessian: Tensor,
    linear: Tensor,
    *,
    capturable: bool = False,
    tol: float = 1e-10,
    max_iter: int = 30,
) -> Solution:
    r"""Minimise :math:`\tfrac12 z^\top H z + q^\top z` over :math:`z \ge 0`.

    On the host an active-set method exchanges all violated signs of all right-hand sides at once;
    it is exact after a handful of rounds. Right-hand sides on which it cycles (singular
    :math:`H`), and all of them with ``capturable``, go through a predictor-corrector interior
    point, whose active set then gives the exact point. With ``capturable`` and up to five entries
    every active set is tried instead.

    Args:
        hessian: :math:`H`, shape ``[m, m]``, symmetric, PSD, diagonal of order one; may be
            singular. Where a row is zero and ``linear`` too, the answer is zero.
        linear: :math:`q`, shape ``[..., m]``: one problem per leading index, each of any scale.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit.
        max_iter: Most rounds of the active-set method, and most iterations of the interior point;
            with ``capturable`` all of these are spent.

    Returns:
        The minimisers, shape ``[..., m]``, with the worst natural residual
        :math:`|\min(z, Hz + q)|_\infty / |q|_\infty` of all problems. Where minimisers are not
        unique, :math:`Hz` still is.

    Raises:
        ValueError: If ``hessian`` is not square.

    Source:
        Active set: Júdice and Pires, Computers & Operations Research 21, 1994. Interior point:
        Mehrotra, SIAM Journal on Optimization 2, 1992.

    Example:
        >>> hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        >>> nonnegative_qp(hessian, torch.tensor([-1.0, 2.0], dtype=torch.float64)).value
        tensor([1., 0.], dtype=torch.float64)
    """
    checks.square(hessian=hessian)
    rows = linear.reshape(-1, linear.shape[-1])
    if not capturable and (len(hessian) <= _FEW or _starts_small(rows)):
        solution = _numbers(hessian, rows, tol)
        if solution.converged.item():
            return solution._replace(value=solution.value.reshape(linear.shape))
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=_TINY)
    rows = rows / scale
    if capturable and len(hessian) <= ENUMERATED:
        (points, residuals), n_iter = best_support(hessian, rows), 0
        residual = residuals.amax()
    elif capturable:
        points, n_iter = interior_point(hessian, rows, None, max_iter)
        residual = natural_residual(hessian, rows, points).amax()
    else:
        points, residual, n_iter = exchange(hessian, rows, tol, max_iter)
        if not residual.item() <= tol:
            points, n_iter = _repair(hessian, rows, points, tol, max_iter)
            residual = natural_residual(hessian, rows, points).amax()
    value = (points.clamp(min=0) * scale).reshape(linear.shape)
    return Solution(value, residual, n_iter, residual <= tol)


def _starts_small(rows: Tensor) -> bool:
    """Tell whether there is but one problem, with a solution that starts with few entries."""
    return rows.numel() <= _SOME and len(rows) == 1 and sum(q < 0 for q in rows[0].tolist()) <= _FEW


def _numbers(hessian: Tensor, rows: Tensor, tol: float) -> Solution:
    """Solve by active sets in plain numbers."""
    matrix = hessian.tolist()
    found = [exchange_numbers(matrix, row, tol) for row in rows.tolist()]
    points, residuals, counts = zip(*found, strict=True)
    return Solution(
        rows.new_tensor(points).clamp(min=0),
        rows.new_tensor(max(residuals)),
        max(counts),
        rows.new_tensor(all(r <= tol for r in residuals), dtype=torch.bool),
    )


def _repair(
    hessian: Tensor, rows: Tensor, points: Tensor, tol: float, max_iter: int
) -> tuple[Tensor, int]:
    """Solve again, by the interior point, the problems that the active sets left unsolved."""
    before = natural_residual(hessian, rows, points)
    unsolved = ~(before <= tol)  # also where a singular block gave NaN
    again, n_iter = interior_point(hessian, rows[unsolved], tol, max_iter)
    worse = natural_residual(hessian, rows[unsolved], again) >= before[unsolved]
    points = points.clone()
    points[unsolved] = torch.where(worse.unsqueeze(-1), points[unsolved], again)
    return points, n_iter
