"""Problems of preference-guided rules, written down for CVXPY as in ``reference``."""

import torch
from torch import Tensor

from gradbal.solvers.reference import load_cvxpy, minimise, root_of, scaled
from gradbal.solvers.solution import Solution

_ACCEPTED = 1e-4  # residual at which a reference counts as converged


def cvxpy_simplex_lp(
    objective: Tensor,
    rows: Tensor,
    bounds: Tensor,
    *,
    capturable: bool = False,
    tol: float = _ACCEPTED,
) -> Solution:
    r"""Maximise :math:`c^\top w` over the simplex subject to :math:`A w \ge b`.

    Args:
        objective: :math:`c`, shape ``[m]``; where it is ``-inf``, :math:`w_i = 0`.
        rows: :math:`A`, shape ``[k, m]``.
        bounds: :math:`b`, shape ``[k]``; where it is ``-inf``, the row does not count.
        capturable: Must be False: CVXPY runs on the host.
        tol: Largest accepted residual.

    Returns:
        What :func:`gradbal.solvers.simplex_lp` returns; the residual is how far a row is violated,
        relative to its terms.

    Raises:
        ValueError: If ``capturable``.

    Source:
        Goulart and Chen, arXiv 2405.12762 (Clarabel).

    Example:
        >>> objective, row = torch.tensor([[3.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> cvxpy_simplex_lp(objective, row[None], objective.new_zeros(1)).value.round(decimals=6)
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    cvxpy = load_cvxpy(capturable)
    used, counted = objective > -torch.inf, bounds > -torch.inf
    weights = torch.full_like(objective, 1 / len(objective))
    if not used.any():
        return Solution(weights, torch.ones_like(weights[0]), 0, used.any())
    matrix, right = rows[counted][:, used], bounds[counted]
    lengths = matrix.abs().amax(1).maximum(right.abs()).clamp(min=1e-300)
    matrix, right = matrix / lengths[:, None], right / lengths
    widths = torch.cat((matrix.abs(), matrix.new_full((1, matrix.shape[1]), 1e-300))).amax(0)
    widths = widths.where(widths > 1e-300, 1)
    matrix, costs = matrix / widths, objective[used] / widths
    p = cvxpy.Variable(len(costs), nonneg=True)
    cost = -(costs / costs.abs().amax().clamp(min=1e-300)).cpu().numpy() @ p
    rules = [(1 / widths).cpu().numpy() @ p == 1, matrix.cpu().numpy() @ p >= right.cpu().numpy()]
    points = minimise(cost, p, rules, objective).clamp(min=0)
    points = points / (points / widths).sum()
    terms = matrix.abs() @ points + right.abs()
    missing = (right - matrix @ points) / terms.clamp(min=1e-300)
    residual = torch.cat((missing, missing.new_zeros(1))).amax()
    value = torch.zeros_like(objective).masked_scatter(used, points / widths)
    return Solution(value, residual, 0, residual <= max(tol, _ACCEPTED))


def cvxpy_ray_descent(
    gram: Tensor,
    ray: Tensor,
    excess: Tensor,
    *,
    eps: float = torch.finfo(torch.float64).eps,
    cone: Tensor | None = None,
    capturable: bool = False,
) -> Solution:
    r"""Minimise :math:`\tfrac12 \|J^\top w\|^2 - b^\top v`, where :math:`w = A^\top \lambda + v`.

    Args:
        gram: Inner products of the rows of J, shape ``[m, m]``.
        ray: What :math:`v` is orthogonal to, shape ``[m]``, positive.
        excess: :math:`b`, shape ``[m]``; of it is used what dependent rows allow.
        eps: Relative rounding error of ``gram``.
        cone: :math:`A`, shape ``[q, m]``; None for the identity.
        capturable: Must be False: CVXPY runs on the host.

    Returns:
        What :func:`gradbal.solvers.ray_descent` returns.

    Raises:
        ValueError: If ``capturable``.

    Source:
        Chen et al., NeurIPS 2024.

    Example:
        >>> gram = torch.tensor([[2.0, -3.0], [-3.0, 10.0]], dtype=torch.float64)
        >>> ray, losses = torch.tensor([[0.6, 0.8], [0.5, 2.0]], dtype=torch.float64)
        >>> cvxpy_ray_descent(gram, ray, losses).value.round(decimals=4)
        tensor([0.5670, 0.3247], dtype=torch.float64)
    """
    cvxpy = load_cvxpy(capturable)
    present = gram.diagonal() > 0
    if not present.any():
        return Solution(torch.zeros_like(ray), torch.zeros_like(ray[0]), 0, ~present.any())
    cone = torch.eye(len(ray), dtype=ray.dtype) if cone is None else cone
    cone = cone[:, present][cone[:, present].abs().sum(1) > 0]
    cosines, near, norms = scaled(gram[present][:, present])
    ray, excess = ray[present], excess[present] / norms.amin() ** 2
    values, vectors = torch.linalg.eigh(cosines)
    within = vectors * (values > len(gram) * eps * values.amax())
    span = torch.cat((within, (ray * near)[:, None]), dim=1)  # what progress there can be
    target = span @ torch.linalg.lstsq(span, excess * near, driver="gelsd").solution
    p, shares = cvxpy.Variable(len(ray)), cvxpy.Variable(len(cone), nonneg=True)
    free = cvxpy.multiply(near.cpu().numpy(), p) - cone.cpu().numpy().T @ shares
    cost = 0.5 * cvxpy.sum_squares(root_of(cosines) @ p) - (target / near).cpu().numpy() @ free
    rules = [cvxpy.sum(shares) == 1, ray.cpu().numpy() @ free == 0]
    points = minimise(cost, p, rules, gram)
    error, along = cosines @ points - target, ray * near
    error = error - (along @ error) / (along @ along) * along
    residual = error.abs().amax() / (cosines @ points).abs().amax().clamp(min=1e-300)
    value = torch.zeros_like(gram[0]).masked_scatter(present, points * near)
    return Solution(value, residual, 0, residual <= _ACCEPTED)
