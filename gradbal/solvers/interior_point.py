"""A primal-dual interior point for quadratic programs over the non-negative orthant."""

import torch
from torch import Tensor

FLOOR = 1e-13  # curvature below which a direction counts as null; the diagonal is about 1
_TINY = 1e-300


def natural_residual(hessian: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    r"""Return :math:`|\min(z, Hz + q)|_\infty` of every problem, shape ``[k]``."""
    return torch.minimum(points, torch.addmm(rows, points, hessian)).abs().amax(-1)


def interior_point(
    hessian: Tensor, rows: Tensor, tol: float | None, max_iter: int
) -> tuple[Tensor, int]:
    r"""Minimise :math:`\tfrac12 z^\top H z + q^\top z` over :math:`z \ge 0` along the central path.

    The active set at its end gives the exact point, kept where it is better.

    Args:
        hessian: :math:`H`, shape ``[m, m]``, symmetric, PSD, diagonal of order one or zero.
        rows: One :math:`q` per row, shape ``[k, m]``, entries of order one.
        tol: Residual at which to leave the path early; None runs all iterations and reads
            nothing back.
        max_iter: Most iterations.

    Returns:
        The points, shape ``[k, m]``, non-negative up to rounding, and the iterations spent.

    Source:
        Mehrotra, SIAM Journal on Optimization 2, 1992. Departure: the corrector is weighted by the
        square of the predictor's step, without which it stalls now and then.

    Example:
        >>> rows = torch.tensor([[-1.0, 1.0]], dtype=torch.float64)
        >>> interior_point(torch.eye(2, dtype=torch.float64), rows, 1e-10, 30)[0]
        tensor([[1., 0.]], dtype=torch.float64)
    """
    dead = (hessian.diagonal() == 0).to(rows.dtype)  # held at z = 0, y = 1
    shifted = rows + dead
    points = torch.ones_like(rows)
    slacks = torch.addmm(shifted, points, hessian).clamp(min=1)
    for n_iter in range(max_iter + 1):
        slopes = torch.addmm(shifted, points, hessian)
        if n_iter == max_iter or (
            tol is not None and torch.minimum(points, slopes).abs().amax().item() <= tol
        ):
            break
        points, slacks = predict_correct(hessian, points, slacks, slopes)
    polished = _polish(hessian, shifted, points, points > slacks)
    better = natural_residual(hessian, shifted, polished) < natural_residual(
        hessian, shifted, points
    )
    return torch.where(better.unsqueeze(-1), polished, points) * (1 - dead), n_iter


def predict_correct(
    hessian: Tensor, points: Tensor, slacks: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Move points and slacks one step; a problem that has converged to rounding stands still."""
    gap = (points * slacks).mean(-1, keepdim=True)
    barrier = torch.diag_embed((slacks / points).clamp(min=FLOOR))
    factor = torch.linalg.cholesky_ex(hessian + barrier)[0]

    def step(target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        move = torch.cholesky_solve((target - slopes).unsqueeze(-1), factor).squeeze(-1)
        other = target - slacks - slacks / points * move
        steepest = torch.maximum(-move / points, -other / slacks).amax(-1, keepdim=True)
        return move, other, 1 / steepest.clamp(min=_TINY)

    move, other, longest = step(torch.zeros_like(slopes))
    reach = longest.clamp(max=1)
    ahead = ((points + reach * move) * (slacks + reach * other)).mean(-1, keepdim=True)
    move, other, longest = step((gap * (ahead / gap) ** 3 - reach**2 * move * other) / points)
    reach = (0.995 * longest).clamp(max=1) * (gap > 1e-20)
    return points + reach * move, slacks + reach * other


def _polish(hessian: Tensor, rows: Tensor, points: Tensor, free: Tensor) -> Tensor:
    """Solve on the free entries, nearest to ``points`` where the solution is not unique."""
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    blocks = torch.where(free.unsqueeze(-1), hessian + 10 * FLOOR * eye, eye)
    factor, pivots, _ = torch.linalg.lu_factor_ex(blocks)
    points = points * free
    for _ in range(3):  # proximal steps: each cuts the error by the floor over the curvature
        slopes = torch.addmm(rows, points, hessian) * free
        points = points - torch.linalg.lu_solve(factor, pivots, slopes.unsqueeze(-1)).squeeze(-1)
    return points
