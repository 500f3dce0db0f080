"""The shortest vector of the convex hull of the task gradients."""

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.nonnegative_qp import nonnegative_qp
from gradbal.solvers.solution import Solution

TOUCHES = 1e-7
_TINY = 1e-300


def min_norm(
    gram: Tensor, *, capturable: bool = False, tol: float = 1e-10, max_iter: int = 30
) -> Solution:
    r"""Minimise :math:`\tfrac12 w^\top G w` over the simplex.

    With the cosines :math:`C`, the norms :math:`n` and :math:`a_i = \min_j n_j / n_i`, the point
    :math:`w_i \propto a_i z_i` comes from the quadratic program

    .. math:: \min_{z \ge 0} \tfrac12 z^\top (C + a a^\top) z - a^\top z,

    which trades the constraint :math:`\sum_i w_i = 1` for a term that fixes the length of
    :math:`z` only: exact, bounded also where the hull holds 0, and free of units. Two tasks have
    a closed form. Tasks without gradient share the whole weight, for then :math:`G w = 0`.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``, PSD up to rounding.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit.
        max_iter: Most iterations of the quadratic program.

    Returns:
        Weights, shape ``[m]``, on the simplex. The residual is the worst of
        :math:`|\min(v_i, (C v)_i - \lambda a_i)|` with :math:`v \propto n w` on the simplex and
        :math:`\lambda = v^\top C v / a^\top v`: no task is nearer than the shortest vector, and
        those with weight are just as near.

    Raises:
        ValueError: If ``gram`` is not square.

    Source:
        Désidéri, Comptes Rendus Mathématique 350, 2012; the homogenised program is the one by
        which Lawson and Hanson, Solving Least Squares Problems, 1974, ch. 23, find least distances.

    Example:
        >>> min_norm(torch.tensor([[2.0, -3.0], [-3.0, 10.0]], dtype=torch.float64)).value
        tensor([0.7222, 0.2778], dtype=torch.float64)
    """
    checks.square(gram=gram)
    if len(gram) == 2 and not capturable:
        return _two_numbers(gram, tol)
    cosines, norms = equilibrate(gram)
    least = norms.amin()
    near = (least / norms).nan_to_num(nan=1.0)  # a zero row is nearest: 0 / 0 counts as 1
    if len(gram) == 2:
        points, n_iter = (near - near.flip(0) * cosines[0, 1]).clamp(min=0), 0
        points = points + (points.sum() == 0)
    else:
        solved = nonnegative_qp(
            torch.addr(cosines, near, near),
            -near,
            capturable=capturable,
            tol=tol,
            max_iter=max_iter,
        )
        points, n_iter = solved.value, solved.n_iter
    if capturable or least.item() == 0:
        points = torch.where(least == 0, (norms == 0).to(points.dtype), points)
    points = points / points.sum()
    residual = _residual(cosines, near, points)
    weights = points * near
    return Solution(weights / weights.sum(), residual, n_iter, residual <= tol)


def touches_zero(gram: Tensor, weights: Tensor) -> Tensor:
    r"""Tell whether the weighted gradients cancel.

    The test is :math:`\|J^\top w\| \le 10^{-7} \sum_i w_i \|g_i\|`: without unit, however far apart
    the norms are. Rounding of a Gram matrix in float64 hides lengths below about ``1e-8``.

    Args:
        gram: Inner products of the task gradients, or their cosines, shape ``[m, m]``.
        weights: Non-negative weights, shape ``[m]``.

    Returns:
        A 0-dim bool tensor.

    Source:
        Ours.

    Example:
        >>> opposed = torch.tensor([[1.0, -2.0], [-2.0, 4.0]], dtype=torch.float64)
        >>> touches_zero(opposed, torch.tensor([2.0, 1.0], dtype=torch.float64))
        tensor(True)
    """
    cosines, norms = equilibrate(gram)
    shares = weights * (norms / norms.amax().clamp(min=_TINY))
    return cancels(cosines, shares)


def cancels(cosines: Tensor, shares: Tensor) -> Tensor:
    """Tell the same of unit gradients, given their cosines."""
    return shares @ cosines @ shares <= (TOUCHES * shares.sum()) ** 2


def _two_numbers(gram: Tensor, tol: float) -> Solution:
    """Solve for two tasks in plain numbers: on the host faster than tensors."""
    (first, inner), (_, second) = gram.tolist()
    weights = [max(second - inner, 0.0), max(first - inner, 0.0)]
    total = sum(weights)
    weights = [w / total for w in weights] if total > 0 else [0.5, 0.5]
    norms = max(first, 0.0) ** 0.5, max(second, 0.0) ** 0.5
    shares = [w * n for w, n in zip(weights, norms, strict=True)]
    if sum(shares) == 0:
        residual = 0.0
    else:
        cosine = inner / norms[0] / norms[1]
        shares = [v / sum(shares) for v in shares]
        near = [min(norms) / n for n in norms]
        slopes = [shares[0] + cosine * shares[1], shares[1] + cosine * shares[0]]
        level = (shares[0] * slopes[0] + shares[1] * slopes[1]) / (
            shares[0] * near[0] + shares[1] * near[1]
        )
        residual = max(
            abs(min(v, s - level * a)) for v, s, a in zip(shares, slopes, near, strict=True)
        )
    return Solution(
        gram.new_tensor(weights),
        gram.new_tensor(residual),
        0,
        gram.new_tensor(residual <= tol, dtype=torch.bool),
    )


def _residual(cosines: Tensor, near: Tensor, points: Tensor) -> Tensor:
    """Return the violation of the optimality conditions, without unit."""
    slopes = cosines @ points
    level = (points @ slopes) / (points @ near)
    return torch.minimum(points, slopes - level * near).abs().amax()
