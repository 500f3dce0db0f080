"""A convex quadratic function over the simplex."""

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.nonnegative_qp import nonnegative_qp
from gradbal.solvers.solution import Solution

_STIFF = 100.0  # weight of the constraint over that of the problem


def simplex_qp(
    matrix: Tensor, linear: Tensor, *, capturable: bool = False, tol: float = 1e-8, n_iter: int = 10
) -> Solution:
    r"""Minimise :math:`\tfrac12 w^\top H w + c^\top w` over the simplex.

    By the method of multipliers: without the constraint :math:`\sum_i w_i = 1`, which costs
    :math:`\tfrac t2 (\sum_i w_i - 1)^2` and the multiplier found so far, the problem is one over
    non-negative numbers. Every round divides the error by about t.

    Args:
        matrix: :math:`H`, shape ``[m, m]``, symmetric, PSD.
        linear: :math:`c`, shape ``[m]``.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit.
        n_iter: Rounds.

    Returns:
        Weights, shape ``[m]``, on the simplex. With the slopes :math:`s = H w + c`, divided by the
        largest entry of H and c, the residual is the largest :math:`|\min(w_i, s_i - s^\top w)|`.

    Raises:
        ValueError: If ``matrix`` is not square.

    Source:
        Hestenes, J. Optimization Theory and Applications 4, 1969; Powell, in: Optimization, 1969.

    Example:
        >>> simplex_qp(torch.eye(2, dtype=torch.float64), torch.tensor([0.0, 0.5]).double()).value
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    checks.square(matrix=matrix)
    size = torch.maximum(matrix.abs().amax(), linear.abs().amax())
    size = size.where(size > 0, 1)
    matrix, linear = matrix / size, linear / size
    multiplier = torch.zeros_like(size)
    for _ in range(n_iter):
        slope = linear - (_STIFF + multiplier)
        point = nonnegative_qp(matrix + _STIFF, slope, capturable=capturable).value
        multiplier = multiplier + _STIFF * (1 - point.sum())
    weights = point / point.sum()
    slopes = matrix @ weights + linear
    residual = torch.minimum(weights, slopes - slopes @ weights).abs().amax()
    return Solution(weights, residual, n_iter, residual <= tol)
