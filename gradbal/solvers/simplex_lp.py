"""Linear programs over the simplex."""

from math import inf
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor

from gradbal.solvers.solution import Solution

_FEW = 16  # up to this size plain numbers are faster than tensors
_PIVOT = 1e-11  # smallest accepted, in a tableau whose entries are of order one
_TIE = 1e-12  # relative difference below which ratios count as equal
_TINY = 1e-300


def simplex_lp(
    objective: Tensor,
    rows: Tensor,
    bounds: Tensor,
    *,
    capturable: bool = False,
    tol: float = 1e-9,
    max_iter: int | None = None,
) -> Solution:
    r"""Maximise :math:`c^\top w` over the simplex subject to :math:`A w \ge b`.

    The dual simplex method: from the best vertex of the simplex on, the row that is violated most,
    relative to its length in the tableau, pushes a variable out of the basis until none is
    violated. A last factorisation of the basis gives the vertex to full precision. Rows and
    columns are scaled by their largest entries before, so that no unit plays a part.

    Args:
        objective: :math:`c`, shape ``[m]``; where it is ``-inf``, :math:`w_i = 0`.
        rows: :math:`A`, shape ``[k, m]``.
        bounds: :math:`b`, shape ``[k]``; where it is ``-inf``, the row does not count.
        capturable: Run a fixed sequence of tensor operations, nothing read back.
        tol: Largest accepted residual, without unit.
        max_iter: Most exchanges, 4 (m + k) by default; with ``capturable`` all of these are spent.

    Returns:
        A vertex, shape ``[m]``. The residual is the worst of how far a row is violated, relative
        to its terms, and how far a reduced cost has the wrong sign, relative to the largest cost.
        If no point satisfies all rows, ``converged`` is False, and the value is a point of the
        simplex that violates some.

    Source:
        Lemke, Naval Research Logistics Quarterly 1, 1954; the choice of the row is the steepest
        edge of Forrest and Goldfarb, Mathematical Programming 57, 1992.

    Example:
        >>> objective, row = torch.tensor([[3.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
        >>> simplex_lp(objective, row[None], objective.new_zeros(1)).value
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    max_iter = 4 * sum(rows.shape) if max_iter is None else max_iter
    if len(objective) <= _FEW and not capturable:
        found = _numbers(objective.tolist(), rows.tolist(), bounds.tolist(), tol, max_iter)
        if found is not None:
            weights, worst, n_iter = found
            residual = objective.new_tensor(worst)
            return Solution(objective.new_tensor(weights), residual, n_iter, residual <= tol)
    problem = _pose(objective, rows, bounds)
    table = _start(problem)
    n_iter = 0
    while n_iter < max_iter and _exchange(problem, table, tol, capturable):
        n_iter += 1
    value, residual = _vertex(problem, table)
    return Solution(value, residual, n_iter, residual <= tol)


class _Problem(NamedTuple):
    """The scaled problem: maximise ``costs @ p`` where ``rows @ p - z = bounds``, ``sums @ p = 1``.

    The variables are, in this order, ``p``, the slacks ``z`` and an artificial one that must not
    be in the basis.
    """

    rows: Tensor  # [k, m]
    bounds: Tensor  # [k]
    sums: Tensor  # [m]
    costs: Tensor  # [m + k + 1], largest 1
    offsets: Tensor  # [m + k + 1], absolute bounds of the slacks
    barred: Tensor  # [m + k + 1], the variables that are held at 0


class _Table(NamedTuple):
    """A tableau: ``basic + entries @ others = last column``; the last row holds reduced costs."""

    entries: Tensor  # [k + 2, m + 1]
    basic: Tensor  # [k + 1], which variables have a row
    others: Tensor  # [m], which have a column


def _pose(objective: Tensor, rows: Tensor, bounds: Tensor) -> _Problem:
    k = len(rows)
    idle = bounds == -torch.inf
    rows, bounds = rows.masked_fill(idle.unsqueeze(-1), 0.0), bounds.masked_fill(idle, 0.0)
    lengths = torch.maximum(rows.abs().amax(-1), bounds.abs())
    lengths = lengths.where(lengths > 0, 1)
    rows, bounds = rows / lengths.unsqueeze(-1), bounds / lengths
    widths = rows.abs().amax(0)
    widths = widths.where(widths > 0, 1)
    barred = objective == -torch.inf
    costs = objective.masked_fill(barred, 0.0) / widths
    costs = costs / costs.abs().amax().clamp(min=_TINY)
    return _Problem(
        rows / widths,
        bounds,
        1 / widths,
        torch.cat((costs, costs.new_zeros(k + 1))),
        torch.cat((costs.new_zeros(len(costs)), bounds.abs(), costs.new_zeros(1))),
        torch.cat((barred, barred.new_zeros(k), barred.new_ones(1))),
    )


def _start(problem: _Problem) -> _Table:
    """Return the tableau at the best vertex of the simplex."""
    rows, bounds, sums, costs, _, barred = problem
    k, m = rows.shape
    entries = rows.new_zeros(k + 2, m + 1)
    entries[:k, :m], entries[:k, m] = -rows, -bounds
    entries[k, :m] = sums
    entries[k, m].fill_(1)  # to assign the number would wait for the device
    entries[k + 1, :m] = -costs[:m]
    labels = torch.arange(m + k + 1, device=rows.device)
    table = _Table(entries, labels[m:].clone(), labels[:m].clone())
    best = (costs[:m] / sums).masked_fill(barred[:m], -torch.inf).argmax(keepdim=True)
    _pivot(table, labels[k : k + 1], best)
    return table


def _exchange(problem: _Problem, table: _Table, tol: float, capturable: bool) -> bool:
    """Exchange two variables; False if nothing is violated or nothing can be done about it."""
    entries, basic, others = table
    values = entries[:-1, -1]
    slack = values + tol * _sizes(problem, values, basic)
    lengths = entries[:-1, :-1].square().sum(-1).add(1).sqrt()
    row = (slack / lengths).argmin(keepdim=True)
    violated = slack.index_select(0, row) < 0
    if not capturable and not violated:
        return False
    line = entries.index_select(0, row).squeeze(0)[:-1]
    able = (line < -_PIVOT) & ~problem.barred.index_select(0, others)
    if not capturable and not able.any():
        return False
    ratios = torch.where(able, entries[-1, :-1].clamp(min=0) / -line, torch.inf)
    nearest = ratios.amin() * (1 + _TIE) + _TIE
    column = torch.where(ratios <= nearest, -line, -1).argmax(keepdim=True)
    _pivot(table, row, column, violated & able.any() if capturable else None)
    return True


def _sizes(problem: _Problem, values: Tensor, basic: Tensor) -> Tensor:
    """Return how large the terms are that the basic variables are made of."""
    total = (values.abs() * (basic < len(problem.sums))).sum()
    return total + problem.offsets.index_select(0, basic)


def _pivot(table: _Table, row: Tensor, column: Tensor, wanted: Tensor | None = None) -> None:
    """Let a row's and a column's variable change places, in place; if not wanted, do nothing."""
    entries, basic, others = table
    line, post = entries.index_select(0, row), entries.index_select(1, column)
    pivot = line.index_select(1, column)
    line = line / pivot
    new = (entries - post * line).index_copy_(0, row, line)
    new.index_copy_(1, column, (-post / pivot).index_copy_(0, row, 1 / pivot))
    coming, going = others.index_select(0, column), basic.index_select(0, row)
    if wanted is not None:
        new = torch.where(wanted, new, entries)
        coming, going = torch.where(wanted, coming, going), torch.where(wanted, going, coming)
    entries.copy_(new)
    basic.index_copy_(0, row, coming)
    others.index_copy_(0, column, going)


def _vertex(problem: _Problem, table: _Table) -> tuple[Tensor, Tensor]:
    """Solve for the basic variables afresh; return the vertex and its residual."""
    rows, bounds, sums, costs, _, barred = problem
    k, m = rows.shape
    every = rows.new_zeros(k + 1, m + k + 1)
    every[:k, :m], every[k, :m], every[k, -1] = rows, sums, 1
    every[:k, m:-1].diagonal().fill_(-1)
    factor, pivots, _ = torch.linalg.lu_factor_ex(every.index_select(1, table.basic))
    right = torch.cat((bounds, bounds.new_ones(1))).unsqueeze(-1)
    values = torch.linalg.lu_solve(factor, pivots, right).squeeze(-1)
    prices = costs.index_select(0, table.basic).unsqueeze(-1)
    prices = torch.linalg.lu_solve(factor, pivots, prices, adjoint=True).squeeze(-1)
    gains = (costs - prices @ every).masked_fill(barred, 0.0)
    sizes = _sizes(problem, values, table.basic)
    missing = torch.where(barred.index_select(0, table.basic), values.abs(), -values) / sizes
    points = torch.zeros_like(costs).scatter(0, table.basic, values)[:m].clamp(min=0) * sums
    return points / points.sum(), torch.maximum(missing.amax(), gains.amax()).clamp(min=0)


def _numbers(
    objective: list[float], rows: list[list[float]], bounds: list[float], tol: float, max_iter: int
) -> tuple[list[float], float, int] | None:
    """Do the same for a few variables in plain numbers; None where these do not suffice."""
    m = len(objective)
    scaled = [[*row, bound] for row, bound in zip(rows, bounds, strict=True) if bound > -inf]
    scaled = [[x / size for x in row] for row in scaled if (size := max(map(abs, row))) > 0]
    widths = [max((abs(row[i]) for row in scaled), default=0.0) or 1.0 for i in range(m)]
    costs = [0.0 if c == -inf else c / w for c, w in zip(objective, widths, strict=True)]
    highest = max(map(abs, costs)) or 1.0
    table = [[*(-row[i] / widths[i] for i in range(m)), -row[m]] for row in scaled]
    table += [[*(1 / w for w in widths), 1.0], [*(-c / highest for c in costs), 0.0]]
    k, free = len(scaled), {i for i in range(m) if objective[i] > -inf}
    if not free:
        return None
    free |= set(range(m, m + k))
    basic, others, offsets = list(range(m, m + k + 1)), list(range(m)), [0.0] * m
    offsets += [*(abs(row[m]) for row in scaled), 0.0]
    best = max(free & set(others), key=lambda i: (costs[i] * widths[i], -i))
    _swap(table, basic, others, k, best)
    for n_iter in range(max_iter + 1):
        total = sum(abs(row[m]) for row, i in zip(table, basic, strict=False) if i < m)
        violated = [
            (row[m] ** 2 / (1 + sum(x * x for x in row[:m])), i)
            for i, row in enumerate(table[:-1])
            if row[m] < -tol * (total + offsets[basic[i]])
        ]
        if not violated:
            break
        leaving = max(violated)[1]
        line = table[leaving]
        able = [j for j in range(m) if line[j] < -_PIVOT and others[j] in free]
        if not able or n_iter == max_iter:
            return None
        _swap(table, basic, others, leaving, _entering(line, table[-1], able))
    values = dict(zip(basic, (max(row[m], 0.0) for row in table[:-1]), strict=True))
    points = [values.get(i, 0.0) / widths[i] for i in range(m)]
    weights = [x / sum(points) for x in points]
    size = sum(map(mul, weights, widths))
    missing = [(row[m] - sum(map(mul, row, weights))) / (size + abs(row[m])) for row in scaled]
    wrong = [-table[-1][j] for j in range(m) if others[j] in free]
    residual = max([0.0, *missing, *wrong])
    return (weights, residual, n_iter) if residual <= tol else None


def _entering(line: list[float], costs: list[float], able: list[int]) -> int:
    """Return the column whose cost is the first to reach 0, of several the largest pivot."""
    ratios = [max(costs[j], 0.0) / -line[j] for j in able]
    nearest = min(ratios) * (1 + _TIE) + _TIE
    tied = [j for j, ratio in zip(able, ratios, strict=True) if ratio <= nearest]
    return min(tied, key=line.__getitem__)


def _swap(
    table: list[list[float]], basic: list[int], others: list[int], row: int, column: int
) -> None:
    """Let a row's and a column's variable change places, in place."""
    line, inverse = table[row], 1 / table[row][column]
    line = [x * inverse for x in line]
    for i, old in enumerate(table):
        factor = old[column]
        table[i] = [x - factor * y for x, y in zip(old, line, strict=True)]
        table[i][column] = -factor * inverse
    table[row] = line
    line[column] = inverse
    basic[row], others[column] = others[column], basic[row]
