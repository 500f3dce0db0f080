"""The same problems, written down for CVXPY: slow, obvious, and the judge of the fast solvers.

All equilibrate first, as the fast ones do, and are solved by Clarabel, an interior point that
stops at about ``1e-8``. CVXPY, of the extra ``cvxpy``, and NumPy are imported only when one of
these is called.
"""

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor

from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.interior_point import natural_residual
from gradbal.solvers.min_norm import cancels
from gradbal.solvers.solution import Solution

_TIGHT = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12, "tol_ktratio": 1e-10}
_ACCEPTED = 1e-4  # residual at which a reference counts as converged


def cvxpy_nonnegative_qp(hessian: Tensor, linear: Tensor, *, capturable: bool = False) -> Solution:
    r"""Minimise :math:`\tfrac12 z^\top H z + q^\top z` over :math:`z \ge 0`, one problem at a time.

    Args:
        hessian: :math:`H`, shape ``[m, m]``, symmetric, PSD.
        linear: :math:`q`, shape ``[..., m]``.
        capturable: Must be False: CVXPY runs on the host.

    Returns:
        What :func:`gradbal.solvers.nonnegative_qp` returns.

    Raises:
        ValueError: If ``capturable``.

    Source:
        Diamond and Boyd, JMLR 17, 2016 (CVXPY); Goulart and Chen, arXiv 2405.12762 (Clarabel).

    Example:
        >>> linear = torch.tensor([-1.0, 2.0], dtype=torch.float64)
        >>> cvxpy_nonnegative_qp(torch.eye(2, dtype=torch.float64), linear).value.round(decimals=6)
        tensor([1., 0.], dtype=torch.float64)
    """
    cvxpy = load_cvxpy(capturable)
    root = root_of(hessian)
    rows = linear.reshape(-1, linear.shape[-1])
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-300)
    rows = rows / scale
    points = torch.zeros_like(rows)
    for k, row in enumerate(rows):
        z = cvxpy.Variable(len(row), nonneg=True)
        cost = 0.5 * cvxpy.sum_squares(root @ z) + row.cpu().numpy() @ z
        points[k] = minimise(cost, z, [], hessian).clamp(min=0)
    residual = natural_residual(hessian, rows, points).amax()
    value = (points * scale).reshape(linear.shape)
    return Solution(value, residual, 0, residual <= _ACCEPTED)


def cvxpy_min_norm(gram: Tensor, *, capturable: bool = False) -> Solution:
    r"""Minimise :math:`\tfrac12 w^\top G w` over the simplex.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``.
        capturable: Must be False: CVXPY runs on the host.

    Returns:
        What :func:`gradbal.solvers.min_norm` returns; the residual is the duality gap
        :math:`(w^\top G w - \min_i (G w)_i) / \max_i G_{ii}`.

    Raises:
        ValueError: If ``capturable``.

    Source:
        Désidéri, Comptes Rendus Mathématique 350, 2012.

    Example:
        >>> cvxpy_min_norm(torch.eye(2, dtype=torch.float64)).value
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    cvxpy = load_cvxpy(capturable)
    cosines, near, _ = scaled(gram)
    v = cvxpy.Variable(len(gram), nonneg=True)
    cost = cvxpy.sum_squares(root_of(cosines) @ v)
    points = minimise(cost, v, [near.cpu().numpy() @ v == 1], gram).clamp(min=0)
    weights = points * near
    weights = weights / weights.sum()
    slopes = gram @ weights
    gap = weights @ slopes - slopes.amin()
    residual = gap / gram.diagonal().amax().clamp(min=1e-300)
    return Solution(weights, residual, 0, residual <= _ACCEPTED)


def cvxpy_cagrad(gram: Tensor, c: float, *, capturable: bool = False) -> Solution:
    r"""Minimise :math:`w^\top b + c \|g_0\| \sqrt{w^\top G w}` over the simplex.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``.
        c: Radius of the ball about the mean gradient :math:`g_0`, in lengths of it.
        capturable: Must be False: CVXPY runs on the host.

    Returns:
        What :func:`gradbal.solvers.cagrad_point` returns; where :math:`J^\top w \ne 0` the
        residual is the gap :math:`w^\top v - \min_i v_i` of the gradient
        :math:`v = b + c \|g_0\| G w / \sqrt{w^\top G w}`, over :math:`\|g_0\| \max_i n_i`.

    Raises:
        ValueError: If ``capturable``.

    Source:
        Liu et al., NeurIPS 2021, the dual problem.

    Example:
        >>> cvxpy_cagrad(torch.eye(2, dtype=torch.float64), 0.5).value
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    cvxpy = load_cvxpy(capturable)
    dead = gram.diagonal() == 0
    even = dead.to(gram.dtype) / dead.sum().clamp(min=1)
    if dead.all():
        return Solution(even, even[0] * 0, 0, dead.all())
    cosines, near, norms = scaled(gram[~dead][:, ~dead])
    shares = norms / norms.amax()
    inner = cosines @ shares
    lean = inner / (shares @ inner).clamp(min=1e-300).sqrt()
    v = cvxpy.Variable(len(near), nonneg=True)
    cost = lean.cpu().numpy() @ v + c * cvxpy.norm(root_of(cosines) @ v, 2)
    points = minimise(cost, v, [near.cpu().numpy() @ v == 1], gram).clamp(min=0)
    length = (points @ cosines @ points).clamp(min=1e-300).sqrt()
    slopes = shares * (lean + c * (cosines @ points) / length)
    weights = points * near
    weights = weights / weights.sum()
    residual = (weights @ slopes - slopes.amin()).abs()
    value = torch.zeros_like(even).masked_scatter(~dead, weights)
    if dead.any() and lean @ points + c * length >= 0:
        value, residual = even, residual * 0  # a task without gradient holds the minimum at 0
    return Solution(value, residual, 0, residual <= _ACCEPTED)


def cvxpy_nash(
    gram: Tensor, *, alpha: float = 1.0, demand: Tensor | None = None, capturable: bool = False
) -> Solution:
    r"""Solve :math:`G x = (a / x)^{1/\alpha}` for :math:`x > 0` as a convex problem.

    The minimiser of :math:`\tfrac12 x^\top G x - \sum_i \psi_i(x_i)` with
    :math:`\psi_i'(x) = (a_i / x)^{1/\alpha}`; tasks without gradient get 0.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``.
        alpha: Fairness; 1 is the bargaining solution.
        demand: :math:`a`, shape ``[m]``, positive; None for 1 each.
        capturable: Must be False: CVXPY runs on the host.

    Returns:
        What :func:`gradbal.solvers.nash_point` returns.

    Raises:
        ValueError: If ``capturable``.

    Source:
        Navon et al., ICML 2022; Ban and Ji, ICML 2024.

    Example:
        >>> cvxpy_nash(torch.eye(2, dtype=torch.float64)).value
        tensor([1.0000, 1.0000], dtype=torch.float64)
    """
    cvxpy = load_cvxpy(capturable)
    cosines, norms = equilibrate(gram)
    live = norms > 0
    if not live.any():
        return Solution(norms, norms.sum(), 0, ~live.any())
    cosines, norms = cosines[live][:, live], norms[live]
    largest = norms.amax()
    unit = (norms / largest) ** ((1 - alpha) / (1 + alpha))  # p = unit * u, u of order one
    if demand is not None:
        unit = unit * demand[live] ** (1 / (1 + alpha))
    factors = unit.square()
    curvature = (unit @ cosines @ unit / factors.sum()).clamp(
        min=1e-12
    )  # small among opposed tasks
    v = cvxpy.Variable(len(norms), pos=True)  # u in units in which it is of order one
    power = 1 - 1 / alpha
    barrier = cvxpy.log(v) if alpha == 1 else cvxpy.power(v, power) / power
    root = root_of(cosines / curvature) * unit.cpu().numpy()
    cost = 0.5 * cvxpy.sum_squares(root @ v) - factors.cpu().numpy() @ barrier
    shares = minimise(cost, v, [], gram) * curvature ** (-alpha / (1 + alpha))
    points = unit * shares
    residual = (shares ** (1 / alpha) * (cosines @ points) / unit - 1).abs().amax()
    weights = points / norms * largest ** ((1 - alpha) / (1 + alpha))
    solved = (residual <= _ACCEPTED) & ~cancels(cosines, points)
    if not solved:
        return Solution(cvxpy_min_norm(gram).value, residual, 0, solved)
    value = torch.zeros_like(live, dtype=gram.dtype).masked_scatter(live, weights)
    return Solution(value, residual, 0, solved)


def load_cvxpy(capturable: bool = False) -> Any:  # its own types cover it in part only
    """Import CVXPY.

    Raises:
        ValueError: If ``capturable``: the caller must not leave the device.
        ModuleNotFoundError: If CVXPY is not installed.
    """
    if capturable:
        raise ValueError(
            "The reference solvers need `capturable=False`, got True: CVXPY runs on the host. "
            "Use the rule's exact solver."
        )
    try:
        import cvxpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'The solver "cvxpy" needs cvxpy, which is not installed; run '
            '`pip install "gradbal[cvxpy]"`.'
        ) from error
    return cvxpy


def scaled(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cosines, smallest norm over each norm (1 where both are 0), and norms."""
    cosines, norms = equilibrate(gram)
    return cosines, (norms.amin() / norms).nan_to_num(nan=1.0), norms


def root_of(matrix: Tensor) -> Any:  # a NumPy array, which is imported only here
    """Return ``R`` with ``R.T @ R`` equal to the matrix, whatever its rank."""
    import numpy

    values, vectors = numpy.linalg.eigh(matrix.cpu().numpy())
    return numpy.sqrt(values.clip(0))[:, None] * vectors.T


def minimise(cost: Any, variable: Any, constraints: list[Any], like: Tensor) -> Tensor:  # CVXPY's
    """Solve and return the variable as a tensor like ``like``; ones where the solver gave up."""
    cvxpy = load_cvxpy()
    problem = cvxpy.Problem(cvxpy.Minimize(cost), constraints)
    for tolerances in (_TIGHT, {}):  # rounding can make Clarabel give up before it is so close
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the tolerances, beyond reach, were not reached
            with contextlib.suppress(cvxpy.SolverError):
                problem.solve(solver=cvxpy.CLARABEL, **tolerances)
        if variable.value is not None:
            break
    if variable.value is None:
        return torch.ones(variable.shape, dtype=like.dtype, device=like.device)
    return torch.as_tensor(variable.value, dtype=like.dtype, device=like.device)
