"""Weights that are a fair bargain between the tasks."""

import torch
from torch import Tensor

from gradbal import checks
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.min_norm import cancels, min_norm
from gradbal.solvers.solution import Solution

_LOST = 1e-4  # a residual above this is no solution
_TINY = 1e-300


def nash_point(
    gram: Tensor,
    *,
    alpha: float = 1.0,
    capturable: bool = False,
    tol: float = 1e-8,
    max_iter: int = 40,
) -> Solution:
    r"""Solve :math:`G x = x^{-1/\alpha}` for :math:`x > 0`, elementwise.

    The solution is the only minimiser of a convex function, a quadratic plus barriers. In the
    variables :math:`p_i = n_i x_i` its matrix is that of the cosines, without any ridge: Newton
    steps, cut short of the boundary, until rounding stops them. Two tasks with
    :math:`\alpha = 1` have a closed form. A task without gradient gets :math:`x_i = 0` and is no
    part of the equations.

    There is a solution if and only if the hull of the task gradients does not hold 0. Otherwise
    (to ``1e-7`` of their norms) ``converged`` is False and the value is that of
    :func:`min_norm`, so that :math:`J^\top x = 0` and all stays finite.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``, PSD up to rounding.
        alpha: Fairness: 1 is the bargaining solution, towards 0 the sum, large the worst task.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit. The steps aim at a hundredth of it.
        max_iter: Most Newton steps; all are spent with ``capturable``.

    Returns:
        Weights, shape ``[m]``, with the residual :math:`\max_i |x_i^{1/\alpha} (G x)_i - 1|`
        over the tasks with gradient. Rounding of :math:`x` alone makes it about
        ``1e-16`` over the squared relative distance of the hull from 0.

    Raises:
        ValueError: If ``gram`` is not square or ``alpha`` is not positive.

    Source:
        Navon et al., ICML 2022, claim 3.1 (:math:`\alpha = 1`); Ban and Ji, ICML 2024, eq. 5.

    Example:
        >>> nash_point(torch.tensor([[2.0, -3.0], [-3.0, 10.0]], dtype=torch.float64)).value
        tensor([1.2324, 0.5512], dtype=torch.float64)
    """
    checks.square(gram=gram)
    checks.positive("nash_point", alpha=alpha)
    cosines, norms = equilibrate(gram)
    dead = norms == 0
    largest = norms.amax().clamp(min=_TINY)
    demand = (norms / largest).masked_fill(dead, 1.0) ** (1 / alpha - 1)
    matrix = cosines + dead.to(gram.dtype).diag()
    if len(gram) == 2 and alpha == 1:
        points, n_iter = (1 + cosines[0, 1]).clamp(min=1e-32).rsqrt().expand(2), 0
    else:
        goal = None if capturable else 0.01 * tol
        points, n_iter = _newton(matrix, demand, alpha, goal, max_iter)
    residual = _residual(matrix, demand, alpha, points)
    shares = points * ~dead
    solved = (residual <= _LOST) & ~cancels(cosines, shares) | dead.all()
    size = largest ** ((1 - alpha) / (1 + alpha))
    weights = (shares * size / norms).masked_fill(dead, 0.0)
    if capturable or not solved:
        shortest = min_norm(gram, capturable=capturable).value
        weights = torch.where(solved, weights, shortest)
    return Solution(weights, residual, n_iter, solved & (residual <= tol))


def _newton(
    matrix: Tensor, demand: Tensor, alpha: float, goal: float | None, max_iter: int
) -> tuple[Tensor, int]:
    """Newton steps on ``matrix @ p = demand * p**(-1/alpha)``; the best point met."""
    points = demand ** (alpha / (1 + alpha))  # solves the equations of orthogonal gradients
    ratio = (points @ points) / (points @ matrix @ points).clamp(min=1e-8 * points @ points)
    points = points * ratio ** (alpha / (1 + alpha))  # and this their sum
    best, least, latest = points, torch.full_like(ratio, torch.inf), 0
    for n_iter in range(max_iter + 1):
        supply = demand * points ** (-1 / alpha)
        slope = matrix @ points - supply
        residual = (slope / supply).abs().amax()
        better = residual < least
        if goal is None:
            best, least = torch.where(better, points, best), torch.minimum(residual, least)
        elif better:
            best, least, latest = points, residual, n_iter
        elif least <= 100 * goal and n_iter > latest + 2:  # rounding stops the steps
            break
        if n_iter == max_iter or (goal is not None and residual <= goal):
            break
        factor = torch.linalg.cholesky_ex(matrix + (supply / points / alpha).diag())[0]
        step = torch.cholesky_solve(slope.unsqueeze(-1), factor).squeeze(-1)
        points = points - step * (0.9 / (step / points).amax().clamp(min=0.9))
    return best, n_iter


def _residual(matrix: Tensor, demand: Tensor, alpha: float, points: Tensor) -> Tensor:
    """Return the largest relative error of the equations."""
    return (points ** (1 / alpha) * (matrix @ points) / demand - 1).abs().amax()
