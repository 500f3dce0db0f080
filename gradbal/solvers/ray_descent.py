"""The steepest descent whose progress leads towards a ray."""

from operator import mul

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.solution import Solution
from gradbal.solvers.spectral import symmetric_eigen

_FEW = 8  # up to this size plain numbers are faster than tensors
_NEAR, _SAFE = 1e-8, 1e3  # pivots, absolute and in rounding errors, that leave no doubt of the rank
_TINY = 1e-300


def ray_descent(
    gram: Tensor,
    ray: Tensor,
    excess: Tensor,
    *,
    eps: float,
    cone: Tensor | None = None,
    capturable: bool = False,
    tol: float = 1e-8,
) -> Solution:
    r"""Minimise :math:`\tfrac12 \|d\|^2 - \min_i (A J d)_i` where :math:`J d - b \parallel r`.

    So every function falls by its excess :math:`b` and, beyond that, all in proportion to the ray
    :math:`r`. The dual problem, which gives :math:`d = J^\top w` with
    :math:`w = A^\top \lambda + v`, is the quadratic program

    .. math:: \min_{\lambda \in \Delta,\; v \perp r} \tfrac12 \|J^\top w\|^2 - b^\top v.

    Its solution satisfies :math:`G w = b + s r`, which leaves one unknown. With
    :math:`\kappa = 1 / r^\top G^{-1} r` and :math:`\tau = \kappa \, r^\top G^{-1} b`, it maximises
    :math:`\min_i (\beta_i + s \rho_i) - (s + \tau)^2 / 2 \kappa`, the lowest of some parabolas of
    one shape, where :math:`\beta = A b` and :math:`\rho = A r`; so

    .. math:: s = \max_i \min\Bigl(\kappa \rho_i - \tau, \;
              \min_{j : \rho_j < \rho_i} \frac{\beta_j - \beta_i}{\rho_i - \rho_j}\Bigr).

    Where gradients are dependent, so that no direction may make this progress, the nearest is
    made, in units of the gradients' norms; eigenvalues of the cosines below
    :math:`m \, \epsilon \, \lambda_{\max}` count as zero. Vectors of length zero get weight 0 and
    are no part of the problem.

    Args:
        gram: Inner products of the rows of J, shape ``[m, m]``, symmetric, PSD.
        ray: :math:`r`, shape ``[m]``, positive.
        excess: :math:`b`, shape ``[m]``; only what is not along the ray matters.
        eps: Relative rounding error of ``gram``.
        cone: :math:`A`, shape ``[q, m]``; None for the identity.
        capturable: Use a fixed sequence of operations on the device.
        tol: Largest accepted residual, without unit.

    Returns:
        Weights :math:`w`, shape ``[m]``, with the largest error of :math:`G w = b + s r`, each
        equation divided by its norm, relative to the largest right-hand side.

    Raises:
        ValueError: If ``gram`` is not square.

    Source:
        The quadratic program is that of Chen et al., NeurIPS 2024; the closed form is ours.

    Example:
        >>> gram = torch.tensor([[2.0, -3.0], [-3.0, 10.0]], dtype=torch.float64)
        >>> ray, losses = torch.tensor([[0.6, 0.8], [0.5, 2.0]], dtype=torch.float64)
        >>> ray_descent(gram, ray, losses, eps=1e-16).value
        tensor([0.5670, 0.3247], dtype=torch.float64)
    """
    checks.square(gram=gram)
    if len(gram) <= _FEW and cone is None and not capturable:
        found = _numbers(gram.tolist(), ray.tolist(), excess.tolist(), eps)
        if found is not None:
            residual = gram.new_tensor(found[1])
            return Solution(gram.new_tensor(found[0]), residual, 0, residual <= tol)
    cosines, norms = equilibrate(gram)
    present = norms > 0
    unit = norms.where(present, torch.inf).amin()  # of length: nothing overflows
    sizes = torch.where(present, unit / norms.where(present, 1), 0)
    common = (excess / ray).where(present, torch.inf).amin()
    excess = torch.where(present, (excess - common * ray) / unit / unit, 0)
    ray = ray.where(present, 0)
    targets = torch.stack((ray, excess), dim=-1) * sizes.unsqueeze(-1)

    solved, held, reach, offset = _solve(cosines, targets, len(gram) * eps, capturable)
    if cone is None:
        level = _best_level(ray, excess, present, reach, offset)
    else:
        present = cone.abs() @ present.to(cone.dtype) > 0
        level = _best_level(cone @ ray, cone @ excess, present, reach, offset)
    mix = torch.stack((level, torch.ones_like(level)))
    shares = solved @ mix
    terms = (targets.abs() @ mix.abs()).amax()
    residual = (cosines @ shares - held @ mix).abs().amax() / terms.clamp(min=_TINY)
    return Solution(shares * sizes, residual, 0, residual <= tol)


def _solve(
    cosines: Tensor, targets: Tensor, rounding: float, capturable: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve for ray and excess; also return their parts that can be, and the parabola of ``s``.

    The parabola has its top at ``reach * rate - offset``. If no combination of the vectors leads
    along the ray, its reach is 0, and the offset the multiple of the ray nearest to the excess.
    """
    values, vectors = symmetric_eigen(cosines, capturable=capturable)
    kept = (values > rounding * values.amax()).unsqueeze(-1)
    parts = vectors.T @ targets
    solved = torch.where(kept, parts / values.unsqueeze(-1), 0)
    lost = parts.masked_fill(kept, 0)
    missing, stray = lost[:, 0] @ lost
    square, product = parts[:, 0] @ solved
    within = missing <= rounding * (targets[:, 0] @ targets[:, 0])
    reach = torch.where(within, 1 / square, 0)
    offset = torch.where(within, product / square, stray / missing)
    return vectors @ solved, targets - vectors @ lost, reach, offset


def _best_level(
    rates: Tensor, starts: Tensor, present: Tensor, reach: Tensor, offset: Tensor
) -> Tensor:
    """Return the ``s`` for which the lowest of ``starts + s * rates - parabola`` is highest."""
    gaps = rates.unsqueeze(-1) - rates
    crossings = ((starts - starts.unsqueeze(-1)) / gaps).where((gaps > 0) & present, torch.inf)
    levels = torch.minimum(reach * rates - offset, crossings.amin(-1))
    return levels.where(present, -torch.inf).amax().nan_to_num(neginf=0.0)


def _numbers(
    gram: list[list[float]], ray: list[float], excess: list[float], eps: float
) -> tuple[list[float], float] | None:
    """Do the same for a few vectors in plain numbers; None if they are near to dependent."""
    tasks = range(len(gram))
    norms = [max(gram[i][i], 0.0) ** 0.5 for i in tasks]
    unit = min(norms)
    if unit == 0:
        return None
    sizes = [unit / norm for norm in norms]
    cosines = [[gram[i][j] / norms[i] / norms[j] for j in tasks] for i in tasks]
    common = min(b / r for b, r in zip(excess, ray, strict=True))
    excess = [(b - common * r) / unit / unit for b, r in zip(excess, ray, strict=True)]
    table = [[*cosines[i], ray[i] * sizes[i], excess[i] * sizes[i]] for i in tasks]
    for k, pivot in enumerate(table):
        if pivot[k] <= max(_NEAR, _SAFE * len(gram) * eps):
            return None
        for row in table[k + 1 :]:
            factor = row[k] / pivot[k]
            row[k:] = [x - factor * y for x, y in zip(row[k:], pivot[k:], strict=True)]
    square = sum(row[-2] ** 2 / row[k] for k, row in enumerate(table))
    offset = sum(row[-2] * row[-1] / row[k] for k, row in enumerate(table)) / square
    level = max(
        min(
            [
                ray[i] / square - offset,
                *((excess[j] - excess[i]) / (ray[i] - ray[j]) for j in tasks if ray[j] < ray[i]),
            ]
        )
        for i in tasks
    )
    shares = [0.0 for _ in tasks]
    for k in reversed(tasks):
        *row, along, beside = table[k]
        known = sum(row[j] * shares[j] for j in range(k + 1, len(row)))
        shares[k] = (beside + level * along - known) / row[k]
    wanted = [(excess[i] + level * ray[i]) * sizes[i] for i in tasks]
    errors = [sum(map(mul, cosines[i], shares)) - wanted[i] for i in tasks]
    terms = max((abs(excess[i]) + abs(level) * ray[i]) * sizes[i] for i in tasks)
    return [*map(mul, shares, sizes)], max(map(abs, errors)) / terms
