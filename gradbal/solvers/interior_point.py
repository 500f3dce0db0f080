"""A primal-dual interior point for quadratic programs over the non-negative orthant."""

import torch
from torch import Tensor

FLOOR = 1e-13  # curvature below which a direction counts as null; the diagonal is about 1
ENUMERATED = 5  # on a device up to this size every support is tried
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
    polished = on_support(hessian, shifted, points, points > slacks)
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
        move = cholesky_solve((target - slopes).unsqueeze(-1), factor).squeeze(-1)
        other = target - slacks - slacks / points * move
        steepest = torch.maximum(-move / points, -other / slacks).amax(-1, keepdim=True)
        return move, other, 1 / steepest.clamp(min=_TINY)

    move, other, longest = step(torch.zeros_like(slopes))
    reach = longest.clamp(max=1)
    ahead = ((points + reach * move) * (slacks + reach * other)).mean(-1, keepdim=True)
    move, other, longest = step((gap * (ahead / gap) ** 3 - reach**2 * move * other) / points)
    reach = (0.995 * longest).clamp(max=1) * (gap > 1e-20)
    return points + reach * move, slacks + reach * other


def cholesky_solve(target: Tensor, factor: Tensor) -> Tensor:
    """Do what ``torch.cholesky_solve`` does, also in a captured graph.

    For a batch on CUDA torch calls MAGMA, which takes memory that no capture allows.
    """
    if not target.is_cuda:
        return torch.cholesky_solve(target, factor)
    half = torch.linalg.solve_triangular(factor, target, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return found


def on_support(hessian: Tensor, rows: Tensor, points: Tensor, free: Tensor) -> Tensor:
    r"""Solve :math:`Hz + q = 0` on the free entries, others 0, nearest to ``points``.

    Args:
        hessian: :math:`H`, shape ``[m, m]``, symmetric, PSD, perhaps singular.
        rows: :math:`q`, shape ``[..., m]``.
        points: Where to start, of that shape.
        free: Which entries are free, of that shape; bool.
    """
    eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    blocks = torch.where(free.unsqueeze(-1), hessian + 10 * FLOOR * eye, eye)
    inverse = torch.linalg.inv_ex(blocks)[0]  # of a batch, in a captured graph, too
    points = points * free
    for _ in range(3):  # proximal steps: each cuts the error by the floor over the curvature
        slopes = (rows + points @ hessian) * free
        points = points - (inverse @ slopes.unsqueeze(-1)).squeeze(-1)
    return points


def best_support(hessian: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""Minimise :math:`\tfrac12 z^\top H z + q^\top z`, :math:`z \ge 0`, by trying every support.

    For a few entries that takes fewer operations than any iteration, and as many for every input.

    Args:
        hessian: As for :func:`interior_point`.
        rows: One :math:`q` per row, shape ``[k, m]``.

    Returns:
        The points, shape ``[k, m]``, and their natural residuals, shape ``[k]``.
    """
    supports = all_supports(len(hessian), hessian.device).unsqueeze(1)
    free = supports.expand(-1, len(rows), -1)
    points = on_support(hessian, rows, torch.zeros_like(rows), free).clamp(min=0)
    residuals = torch.minimum(points, rows + points @ hessian).abs().amax(-1)
    least, best = residuals.nan_to_num(nan=torch.inf).min(0)
    index = best[None, :, None].expand(1, *rows.shape)
    return points.gather(0, index).squeeze(0), least


def all_supports(m: int, device: torch.device) -> Tensor:
    """Return every set of m entries as a mask, shape ``[2 ** m, m]``, bool."""
    sets = torch.arange(2**m, device=device).unsqueeze(1)
    return (sets >> torch.arange(m, device=device)) % 2 == 1
