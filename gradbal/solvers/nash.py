"""Weights that are a fair bargain between the tasks."""

import contextlib
from math import isnan

import numpy as np
import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.interior_point import cholesky_solve
from gradbal.solvers.min_norm import TOUCHES, min_norm
from gradbal.solvers.solution import Solution

_FEW = 32  # tasks up to which NumPy is faster than tensors
_LOST = 1e-4  # a residual above this is no solution
_NEAR = 1e-4  # a relative step from which on Newton's method converges quadratically
_STILL = 1e-12  # and one that is but rounding
_SLACK = 0.2  # least part of a gradient that the start assumes the others leave of it
_ROUNDED = 1e-8  # cosine of task and direction below which a Gram matrix has but rounding errors
_TINY = 1e-300


def nash_point(
    gram: Tensor,
    *,
    alpha: float = 1.0,
    demand: Tensor | None = None,
    capturable: bool = False,
    tol: float = 1e-8,
    max_iter: int = 40,
) -> Solution:
    r"""Solve :math:`G x = (a / x)^{1/\alpha}` for :math:`x > 0`, elementwise.

    The solution is the only minimiser of a convex function, a quadratic plus barriers. In the
    variables :math:`p_i = n_i x_i`, whose matrix is that of the cosines, without any ridge, it is
    where :math:`C p = y` and :math:`y_i = u_i (p_i / u_i)^{-1/\alpha}`. Newton steps take the
    logarithm of the second and move :math:`p` and :math:`y` by factors, until rounding stops them:
    solutions many decades away are a few steps away. Two tasks with :math:`\alpha = 1` and equal
    demands have a closed form. A task without gradient gets :math:`x_i = 0` and is no part of the
    equations.

    There is a solution if and only if the hull of the task gradients does not hold 0. Otherwise
    (to ``1e-7`` of their norms) ``converged`` is False and the value is that of
    :func:`min_norm`, so that :math:`J^\top x = 0` and all stays finite.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``, PSD up to rounding.
        alpha: Fairness: 1 is the bargaining solution, towards 0 the sum, large the worst task.
        demand: How much each task asks for, :math:`a`, shape ``[m]``, positive; None for 1 each.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit.
        max_iter: Most Newton steps; all are spent with ``capturable``.

    Returns:
        Weights, shape ``[m]``, with the residual
        :math:`\max_i |(C p)_i - y_i| / \max(y_i, 10^{-8} \lVert J^\top x \rVert)`: relative to
        each side, as far as a cosine of task and direction can be told from 0.

    Raises:
        ValueError: If ``gram`` is not square or ``alpha`` is not positive.

    Source:
        Navon et al., ICML 2022, claim 3.1 (:math:`\alpha = 1`); Ban and Ji, ICML 2024, eq. 5;
        demands as in Qin et al., CVPR 2025.

    Example:
        >>> nash_point(torch.tensor([[2.0, -3.0], [-3.0, 10.0]], dtype=torch.float64)).value
        tensor([1.2324, 0.5512], dtype=torch.float64)
    """
    checks.square(gram=gram)
    checks.positive("nash_point", alpha=alpha)
    if len(gram) <= _FEW and not capturable:
        asked = 1.0 if demand is None else demand.numpy()
        with np.errstate(all="ignore"), contextlib.suppress(np.linalg.LinAlgError):
            if found := _on_host(gram.numpy(), asked, alpha, tol, max_iter):
                weights, residual = torch.from_numpy(found[0]), gram.new_tensor(found[1])
                return Solution(weights, residual, found[2], residual <= tol)
    cosines, norms = equilibrate(gram)
    live = norms.sign()
    dead = 1 - live
    largest = norms.amax().clamp(min=_TINY)
    unit = (norms / largest + dead) ** ((1 - alpha) / (1 + alpha))
    if demand is not None:
        unit = unit * demand ** (1 / (1 + alpha))
    matrix = cosines + dead.diag()
    if len(gram) == 2 and alpha == 1 and demand is None:
        points, n_iter = (1 + cosines[0, 1]).clamp(min=1e-32).rsqrt().expand(2), 0
        supply = 1 / points
    else:
        goal = None if capturable else 0.1 * tol
        points, supply, n_iter = _newton(matrix, unit, alpha, goal, max_iter)
    shares = points * live
    length = (shares @ supply).sqrt()
    error = torch.addmv(supply, matrix, points, beta=-1).abs()
    residual = (error / torch.maximum(supply, _ROUNDED * length)).amax()
    solved = (residual <= _LOST) & (length >= TOUCHES * shares.sum())
    weights = shares * largest ** ((1 - alpha) / (1 + alpha)) / (norms + dead)
    if capturable or not solved:
        shortest = min_norm(gram, capturable=capturable).value
        weights = torch.where(solved, weights, shortest)
        residual = residual.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Solution(weights, residual, n_iter, solved & (residual <= tol))


def _newton(
    matrix: Tensor, unit: Tensor, alpha: float, goal: float | None, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Take Newton steps on ``matrix @ p = y`` and ``log(y / unit) + log(p / unit) / alpha = 0``."""
    slack = (matrix @ unit / unit).clamp(min=_SLACK)  # 1 for orthogonal gradients
    level = slack.log() * (-alpha / (1 + alpha))  # exact for them, and for parallel ones
    logs = torch.stack((level, level / -alpha))
    points, supply = (unit * logs.exp()).unbind()
    for n_iter in range(1, max_iter + 1):
        slope = torch.addmv(supply, matrix, points, beta=-1)
        level, other = logs.unbind()
        error = other + level / alpha
        curved = matrix + (supply / (alpha * points)).diag()
        factor = torch.linalg.cholesky_ex(curved)[0]
        target = torch.addcmul(slope, supply, error).unsqueeze(1)
        step = cholesky_solve(target, factor).squeeze(1) / points
        moves = torch.stack((-step, step / alpha - error))
        logs = logs + moves.asinh()  # as a small move itself; a large one doubles or halves
        points, supply = (unit * logs.exp()).unbind()
        if n_iter == max_iter or (
            goal is not None and _arrived(matrix, points, supply, moves, goal)
        ):
            break
    return points, supply, n_iter


def _arrived(matrix: Tensor, points: Tensor, supply: Tensor, moves: Tensor, goal: float) -> bool:
    """Tell whether a step, whose error is its square times what cancels, reached the goal."""
    reach: float = moves.abs().amax().item()
    if not reach <= _NEAR:
        return isnan(reach)
    cancels = (matrix.abs() @ points / supply).amax().item()
    return reach <= _STILL or reach * reach * cancels <= goal


def _on_host(
    gram: np.ndarray, demand: float | np.ndarray, alpha: float, tol: float, max_iter: int
) -> tuple[np.ndarray, float, int] | None:
    """Do the same in NumPy, faster for some tasks; None where these steps are not enough."""
    norms = np.sqrt(np.maximum(gram.diagonal(), 0))
    if not norms.all():
        return None
    largest, power = norms.max(), (1 - alpha) / (1 + alpha)
    unit = (norms / largest) ** power * demand ** (1 / (1 + alpha))
    matrix = gram / norms / norms[:, None]
    logs = np.log(np.maximum(matrix @ unit / unit, _SLACK)) * (-alpha / (1 + alpha))
    others, diagonal = logs / -alpha, slice(None, None, len(norms) + 1)
    points, supply = unit * np.exp(logs), unit * np.exp(others)
    for n_iter in range(1, max_iter + 1):
        error = others + logs / alpha
        curved = matrix.copy()
        curved.ravel()[diagonal] += supply / (alpha * points)
        step = np.linalg.solve(curved, matrix @ points - supply + supply * error) / points
        other = step / alpha - error
        logs, others = logs - np.arcsinh(step), others + np.arcsinh(other)
        points, supply = unit * np.exp(logs), unit * np.exp(others)
        reach = max(np.abs(step).max(), np.abs(other).max())
        if n_iter == max_iter or not reach > _STILL:
            break
        if reach <= _NEAR:
            cancels = (np.abs(matrix) @ points / supply).max()
            if reach * reach * cancels <= 0.1 * tol:
                break
    length = np.sqrt(points @ supply)
    gap = np.abs(matrix @ points - supply) / np.maximum(supply, _ROUNDED * length)
    residual = float(gap.max())
    if not residual <= tol or length < TOUCHES * points.sum():
        return None
    return points / norms * largest**power, residual, n_iter
