"""The point of the hull that CAGrad leans its mean gradient towards."""

from typing import NamedTuple

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.active_set import GATHER, PATIENCE
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.interior_point import ENUMERATED, FLOOR, all_supports, predict_correct
from gradbal.solvers.min_norm import cancels, min_norm
from gradbal.solvers.solution import Solution

_LOST = 1e-4  # a residual above this is no solution
_TINY = 1e-300


def cagrad_point(
    gram: Tensor,
    c: float,
    *,
    capturable: bool = False,
    tol: float = 1e-10,
    max_iter: int = 30,
) -> Solution:
    r"""Minimise :math:`w^\top b + c \|g_0\| \sqrt{w^\top G w}` over the simplex.

    Here :math:`b = G 1 / m` holds the inner products with the mean gradient :math:`g_0`. With
    cosines :math:`C`, norms :math:`n`, :math:`a_i = \min_j n_j / n_i` and the cosines
    :math:`\beta` of the tasks with :math:`g_0`, the minimiser is :math:`w_i \propto a_i z_i` for

    .. math:: y = C z + \beta - t a \ge 0, \quad z \ge 0, \quad z^\top y = 0, \quad
              z^\top C z = c^2,

    where :math:`t` is the minimum sought. For known :math:`t` it is a quadratic program, for
    known signs a quadratic equation in :math:`t`. On the host an active-set method exchanges
    all violated signs at once. Where it cycles, and with ``capturable``, an interior point
    takes :math:`t` along as the value of the objective, followed by Newton steps on its support.

    Where the hull holds 0 the minimum may lie at :math:`J^\top w = 0`; then the value is that of
    :func:`min_norm`, :func:`touches_zero` tells, and the rule's direction is 0 by convention.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``, PSD up to rounding.
        c: Radius of the ball about the mean gradient, in lengths of it; not negative.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit.
        max_iter: Most iterations of either method.

    Returns:
        Weights, shape ``[m]``, on the simplex, with the residual :math:`\max_i |\min(z_i, y_i)|`
        after :math:`z` was scaled to the right length.

    Raises:
        ValueError: If ``gram`` is not square or ``c`` is negative.

    Source:
        Liu et al., NeurIPS 2021, alg. 1 and its dual; the solution by active sets is ours.

    Example:
        >>> gram = torch.tensor([[6, 1, -10], [1, 11, -10], [-10, -10, 56]], dtype=torch.float64)
        >>> cagrad_point(gram, 0.5).value
        tensor([0.9274, 0.0726, 0.0000], dtype=torch.float64)
    """
    checks.square(gram=gram)
    checks.at_least("cagrad_point", 0, c=c)
    cosines, norms = equilibrate(gram)
    problem, dead = _pose(cosines, norms, c)
    points, residual, n_iter = _solve(problem, capturable, tol, max_iter)
    regular = (residual <= _LOST) & ~cancels(cosines, points)
    if capturable or dead.any():  # these could bring the minimum down to 0
        regular &= ~(dead.any() & (problem.level(points) >= 0))
    weights = points.abs() * problem.near  # no -0.0
    if capturable or not regular:
        shortest = min_norm(gram, capturable=capturable, tol=tol)
        weights = torch.where(regular, weights, shortest.value)
        residual = torch.where(regular, residual, shortest.residual)
    return Solution(weights / weights.sum(), residual, n_iter, residual <= tol)


class _Problem(NamedTuple):
    """The equilibrated problem; tasks without gradient have zeros everywhere."""

    cosines: Tensor  # C
    near: Tensor  # a, smallest norm over each norm
    lean: Tensor  # beta, cosine of every gradient with their mean
    c: float

    def level(self, points: Tensor) -> Tensor:
        """Return the objective, whatever the length of ``points``; its minimum is ``t``."""
        length = ((points @ self.cosines) * points).sum(-1).clamp(min=0).sqrt()
        return (points @ self.lean + self.c * length) / (points @ self.near).clamp(min=_TINY)

    def slopes(self, points: Tensor, level: Tensor) -> Tensor:
        """Return ``y``."""
        return points @ self.cosines + self.lean - level.unsqueeze(-1) * self.near

    def residual(self, points: Tensor) -> Tensor:
        """Return the violation of the conditions, after scaling ``points`` to length ``c``."""
        length = ((points @ self.cosines) * points).sum(-1).clamp(min=_TINY).sqrt()
        points = points * (self.c / length).unsqueeze(-1)
        return torch.minimum(points, self.slopes(points, self.level(points))).abs().amax(-1)


def _pose(cosines: Tensor, norms: Tensor, c: float) -> tuple[_Problem, Tensor]:
    """Return the equilibrated problem, and which tasks have no gradient."""
    dead = norms == 0
    near = (norms.masked_fill(dead, torch.inf).amin() / norms).masked_fill(dead, 0.0)
    shares = norms / norms.amax().clamp(min=_TINY)
    inner = cosines @ shares
    length = (shares @ inner).clamp(min=0).sqrt()
    lean = (inner / length.clamp(min=_TINY)).masked_fill(length == 0, 0.0)
    return _Problem(cosines, near, lean, c), dead


def _solve(
    problem: _Problem, capturable: bool, tol: float, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Return the points, up to their length, and residual, by the fast method or the safe one."""
    _, near, lean, c = problem
    if c == 0:
        first = (lean / near).nan_to_num(torch.inf).argmin()
        return torch.zeros_like(near).scatter(0, first, 1.0), torch.zeros_like(near).sum(), 0
    if not capturable:
        points, residual, n_iter = _exchange(problem, tol, max_iter)
        if residual.item() <= tol:
            return points, residual, n_iter
    elif len(near) <= ENUMERATED:
        return *_best_support(problem), 0
    return _interior_point(problem, None if capturable else tol, max_iter)


def _best_support(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Solve on every support that there is, and take the best."""
    m = len(problem.near)
    free = all_supports(m, problem.near.device) & (problem.near > 0)
    solved = _on_set(problem, free, capturable=True)[0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    points = torch.cat((solved, _polish(problem, solved, free))).clamp(min=0)
    residuals = problem.residual(points).where(points.amax(-1) > 0, torch.inf)
    least, best = residuals.nan_to_num(nan=torch.inf).min(0, keepdim=True)
    return points.index_select(0, best).squeeze(0), least.squeeze(0)


def _exchange(problem: _Problem, tol: float, max_iter: int) -> tuple[Tensor, Tensor, int]:
    """Active sets: solve for ``t`` on the set, then let all violated signs change sides."""
    _, near, lean, c = problem
    nearest = ((lean + c) / near).nan_to_num(torch.inf).amin()  # the best single task
    free = nearest * near > lean
    fewest, patience = free.numel() + 1, PATIENCE
    for n_iter in range(1, max_iter + 1):
        points, level = _on_set(problem, free)
        slopes = problem.slopes(points, level)
        length = ((points @ problem.cosines) * points).sum().clamp(min=0).sqrt()
        off = torch.minimum(points, slopes).abs().amax()
        residual = torch.maximum(off, (length - c).abs())  # on a singular block it may be off
        if residual.item() <= tol or n_iter == max_iter:
            break
        previous, free = free, points > slopes
        changed = int((free ^ previous).sum().item())
        patience = PATIENCE if changed < fewest else patience - 1
        fewest = min(fewest, changed)
        if changed == 0 or patience == 0:
            break
    return points.clamp(min=0), residual, n_iter


def _on_set(problem: _Problem, free: Tensor, capturable: bool = False) -> tuple[Tensor, Tensor]:
    """Return the points with support ``free`` and the larger ``t`` that gives them length ``c``."""
    cosines, near, lean, c = problem
    both = torch.stack((near, lean), dim=-1)
    if capturable or len(cosines) < GATHER:
        eye = torch.eye(len(cosines), dtype=cosines.dtype, device=cosines.device)
        support = free.unsqueeze(-1)
        block = torch.where(support, cosines, eye)
        up, back = torch.linalg.solve_ex(block, both * support)[0].unbind(-1)
    else:
        index = free.nonzero().squeeze(-1)
        inner = torch.linalg.solve_ex(cosines[index][:, index], both[index])[0]
        up, back = torch.zeros_like(both).index_copy(0, index, inner).unbind(-1)
    square, mixed, rest = up @ near, up @ lean, back @ lean - c * c
    level = (mixed + (mixed * mixed - square * rest).clamp(min=0).sqrt()) / square
    return level.unsqueeze(-1) * up - back, level


def _interior_point(
    problem: _Problem, tol: float | None, max_iter: int
) -> tuple[Tensor, Tensor, int]:
    """Follow the central path with ``t`` kept at the objective, then solve on the support."""
    live = problem.near.sign()
    points = torch.ones_like(live)
    slacks = problem.slopes(points, torch.zeros_like(live[0])).clamp(min=1)
    for n_iter in range(max_iter + 1):
        slopes = problem.slopes(points, problem.level(points * live)) + (1 - live)
        if n_iter == max_iter or (
            tol is not None and torch.minimum(points, slopes).abs().amax().item() <= tol
        ):
            break
        moved = predict_correct(problem.cosines, points[None], slacks[None], slopes[None])
        points, slacks = moved[0][0], moved[1][0]
    free = (points > slacks) & (live > 0)
    best, least = points * live, problem.residual(points * live)
    for other in (_polish(problem, best, free), _on_set(problem, free, capturable=True)[0]):
        candidate = other.clamp(min=0)
        residual = problem.residual(candidate)
        better = residual < least  # False for NaN, from a singular block
        best, least = torch.where(better, candidate, best), torch.where(better, residual, least)
    return best, least, n_iter


def _polish(problem: _Problem, points: Tensor, free: Tensor) -> Tensor:
    """Newton steps on the support; proximal, so that a singular block does no harm."""
    eye = torch.eye(free.shape[-1], dtype=points.dtype, device=points.device)
    block = torch.where(free.unsqueeze(-1), problem.cosines + 10 * FLOOR * eye, eye)
    inverse = torch.linalg.inv_ex(block)[0]
    points = points * free
    for _ in range(4):
        slopes = problem.slopes(points, problem.level(points)) * free
        points = points - (inverse @ slopes.unsqueeze(-1)).squeeze(-1)
    return points
