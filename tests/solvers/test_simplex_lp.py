from collections.abc import Iterator
from importlib import import_module

import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, draw, half_rank_stationary, rows
from torch import Tensor

from gradbal.solvers import cvxpy_simplex_lp, simplex_lp

Program = tuple[Tensor, Tensor, Tensor]
INF = torch.inf
SIZES = [2, 3, 8, 16, 40, 128]


def gram_of(family: str, m: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    jac = half_rank_stationary(m, generator) if family == "stationary" else draw(family, m, seed)
    return jac @ jac.T


def descent(gram: Tensor) -> Program:
    """The fastest fall of the sum for which nothing rises."""
    return gram.sum(0), gram, torch.zeros_like(gram[0])


def pull(gram: Tensor, seed: int = 0) -> Program:
    """As near as possible to a direction that lowers some, and raises others no more than it."""
    generator = torch.Generator().manual_seed(seed)
    lean = torch.randn(len(gram), generator=generator, dtype=torch.float64)
    wanted = gram @ lean
    bounds = torch.where(wanted > 0, -INF, wanted)
    bounds[lean.argmax()] = 0
    return wanted, torch.cat((gram, wanted[None])), torch.cat((bounds, bounds.new_full((1,), -INF)))


def programs(family: str, m: int) -> Iterator[Program]:
    for seed in range(3 if m < 40 else 1):
        yield descent(gram_of(family, m, seed))
        yield pull(gram_of(family, m, seed), seed)


def violation(program: Program, weights: Tensor) -> float:
    """How far the weights are from feasible and from what multipliers can certify.

    Rows are divided by their largest entries, then columns; certified is optimality if the costs
    are a sum of prices of tight rows, of signs of zero weights, and of the sum of weights.
    """
    objective, matrix, bounds = program
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= 1e-14
    counts = bounds > -INF
    matrix, bounds = matrix[counts], bounds[counts]
    lengths = torch.cat((matrix, bounds[:, None]), dim=1).abs().amax(dim=1).clamp(min=1e-300)
    matrix, bounds = matrix / lengths[:, None], bounds / lengths
    widths = matrix.abs().amax(dim=0)
    matrix, costs = matrix / widths, objective / widths
    costs = costs / costs.abs().max().clamp(min=1e-300)
    points = weights * widths
    slacks = (matrix @ points - bounds) / (points.sum() + bounds.abs())
    tight, unused = slacks <= 1e-8, points <= 1e-10 * points.sum()
    even = (1 / widths)[:, None] / (1 / widths).max()
    pieces = (-matrix[tight].T, -torch.eye(len(points)).double()[:, unused], even, -even)
    _, certified = scipy.optimize.nnls(torch.cat(pieces, dim=1).numpy(), costs.numpy())
    return max((-slacks).max().item(), certified)


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", [*FAMILIES, "stationary"])
def test_optimality_conditions(family: str, m: int) -> None:
    for program in programs(family, m):
        solution = simplex_lp(*program)
        assert solution.converged
        assert violation(program, solution.value) <= 1e-8


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", [*FAMILIES, "stationary"])
def test_agrees_with_linprog(family: str, m: int) -> None:
    for objective, matrix, bounds in programs(family, m):
        found = simplex_lp(objective, matrix, bounds)
        counts, size = bounds > -INF, objective.abs().max().clamp(min=1e-300)
        lengths = matrix.abs().amax(dim=1)
        judge = scipy.optimize.linprog(
            -(objective / size).numpy(),
            A_ub=-(matrix / lengths[:, None])[counts].numpy(),
            b_ub=-(bounds / lengths)[counts].numpy(),
            A_eq=torch.ones(1, len(objective)).numpy(),
            b_eq=[1],
        )
        assert judge.status == 0
        assert abs(found.value @ objective / size + judge.fun) <= 1e-8


@pytest.mark.parametrize("family", ["conflicting", "six_decades"])
def test_agrees_with_cvxpy(family: str) -> None:
    for objective, matrix, bounds in programs(family, 6):
        found, judge = (
            solve(objective, matrix, bounds) for solve in (simplex_lp, cvxpy_simplex_lp)
        )
        assert judge.converged
        assert abs((found.value - judge.value) @ objective) <= 1e-6 * objective.abs().max()


@pytest.mark.parametrize("m", [2, 3, 8, 16, 40])
@pytest.mark.parametrize("family", [*FAMILIES, "stationary"])
def test_all_paths_agree(family: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for program in programs(family, m):
        numbers, device = (simplex_lp(*program, capturable=flag) for flag in (False, True))
        with monkeypatch.context() as patch:
            patch.setattr(import_module("gradbal.solvers.simplex_lp"), "_FEW", 0)
            tensors = simplex_lp(*program)
        assert device.converged
        torch.testing.assert_close(device.value, tensors.value, rtol=0, atol=0)
        size = program[0].abs().max()
        assert abs((device.value - numbers.value) @ program[0]) <= 1e-10 * size
        assert violation(program, device.value) <= 1e-8


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name: str, capturable: bool) -> None:
    jac = rows(EDGES[name])
    for program in (descent(jac @ jac.T), pull(jac @ jac.T)):
        solution = simplex_lp(*program, capturable=capturable)
        assert solution.converged
        reference = cvxpy_simplex_lp(*program)
        same = (solution.value - reference.value) @ program[0]
        assert abs(same) <= 1e-6 * program[0].abs().max()


@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize("capturable", [False, True])
def test_without_rows_the_best_takes_all(capturable: bool, m: int) -> None:
    objective = torch.arange(m, dtype=torch.float64).flip(0)
    idle = torch.full((2,), -INF, dtype=torch.float64)
    for matrix in (torch.zeros(2, m).double(), torch.ones(2, m).double()):
        found = simplex_lp(objective, matrix, idle, capturable=capturable)
        assert found.converged
        assert found.value.tolist() == [1.0] + [0.0] * (m - 1)


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("capturable", [False, True])
def test_barred_variables_stay_zero(capturable: bool, m: int) -> None:
    objective, matrix, bounds = descent(gram_of("conflicting", m))
    keep = torch.arange(m) % 3 != 0
    barred = objective.masked_fill(~keep, -INF)
    found = simplex_lp(barred, matrix, bounds, capturable=capturable)
    alone = simplex_lp(objective[keep], matrix[:, keep], bounds, capturable=capturable)
    assert found.converged == alone.converged
    torch.testing.assert_close(found.value[~keep], torch.zeros(int((~keep).sum())).double())
    if alone.converged:
        torch.testing.assert_close(found.value[keep], alone.value)


@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("capturable", [False, True])
def test_what_cannot_be_is_told(capturable: bool, m: int) -> None:
    eye = torch.eye(m, dtype=torch.float64)
    half = torch.full((m,), 1.5 / m, dtype=torch.float64)
    nothing = torch.full((m,), -INF, dtype=torch.float64)
    for program in ((eye[0], eye, half), (nothing, eye, 0 * half)):
        for solve in (simplex_lp, cvxpy_simplex_lp):
            if solve is cvxpy_simplex_lp and capturable:
                continue
            found = solve(*program, capturable=capturable)
            assert not found.converged
            assert found.value.isfinite().all()
            assert (found.value >= 0).all()
            torch.testing.assert_close(found.value.sum().item(), 1.0)


def test_rows_that_meet_in_a_point() -> None:
    matrix = rows([[1, -1], [-1, 1]])
    for flag in (False, True):
        found = simplex_lp(rows([[1, 0]])[0], matrix, torch.zeros(2).double(), capturable=flag)
        assert found.converged
        torch.testing.assert_close(found.value, rows([[0.5, 0.5]])[0])


@pytest.mark.parametrize("m", [2, 20])
def test_a_vertex_that_satisfies_its_row_exactly_needs_no_exchange(m: int) -> None:
    objective = torch.eye(m, dtype=torch.float64)[0]
    found = simplex_lp(objective, 1 - objective[None], torch.zeros(1).double(), tol=0.0)
    assert found.value.tolist() == objective.tolist()
    assert found.n_iter == 0
    assert found.converged


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("capturable", [False, True])
def test_rows_may_be_violated_within_the_tolerance(capturable: bool, m: int) -> None:
    """The first vertex violates a row by 0.05 of the largest term."""
    objective, matrix = torch.eye(m, dtype=torch.float64)[0], torch.ones(2, m).double()
    matrix[0, 0] = -0.05
    bounds = rows([[0, 1]])[0]
    for tol, first in ((0.1, 1.0), (1e-9, 1 / 1.05)):
        found = simplex_lp(objective, matrix, bounds, capturable=capturable, tol=tol)
        assert found.converged
        torch.testing.assert_close(found.value[0].item(), first)


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("capturable", [False, True])
def test_of_columns_that_cost_the_same_the_largest_pivot_comes(capturable: bool, m: int) -> None:
    matrix = torch.ones(2, m, dtype=torch.float64)
    matrix[0], matrix[0, 0], matrix[0, 2] = 1e-3, -1, 1
    bounds = rows([[0, 0.5]])[0]
    found = simplex_lp(torch.zeros_like(matrix[0]), matrix, bounds, capturable=capturable)
    assert found.value.tolist() == [0.5, 0.0, 0.5] + [0.0] * (m - 3)


@pytest.mark.parametrize("capturable", [False, True])
def test_residual_of_a_point_that_violates_a_row(capturable: bool) -> None:
    """It counts relative to the terms of the row, here 1 for the point and 0.25 for the bound."""
    m = 20
    objective, matrix = torch.eye(m, dtype=torch.float64)[0], torch.ones(2, m).double()
    matrix[0, 0] = -0.5
    found = simplex_lp(objective, matrix, rows([[0.25, 0.5]])[0], capturable=capturable, max_iter=0)
    assert found.value.tolist() == [1.0] + [0.0] * (m - 1)
    torch.testing.assert_close(found.residual.item(), (0.25 + 0.5) / (1 + 0.25))
    assert not found.converged


@settings(derandomize=True, deadline=None, max_examples=60)
@given(m=st.integers(2, 20), exponent=st.integers(-60, 60), seed=st.integers(0, 999))
def test_scale_and_order_play_no_part(m: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    objective, matrix, bounds = pull(gram_of("conflicting", m, seed), seed)
    found = simplex_lp(objective, matrix, bounds).value
    order = torch.randperm(m, generator=generator)
    lines = torch.randperm(len(bounds), generator=generator)
    sizes = 10 ** (6 * torch.rand(len(bounds), generator=generator, dtype=torch.float64) - 3)
    other = simplex_lp(
        objective[order] * 10.0**exponent,
        (matrix * sizes[:, None])[lines][:, order],
        (bounds * sizes)[lines],
    )
    torch.testing.assert_close(other.value, found[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("capturable", [False, True])
def test_too_few_iterations_are_told(capturable: bool) -> None:
    program = descent(gram_of("conflicting", 30))
    solution = simplex_lp(*program, capturable=capturable, max_iter=1)
    assert solution.n_iter == 1
    assert not solution.converged
    assert (solution.value >= 0).all()
    torch.testing.assert_close(solution.value.sum().item(), 1.0)


def test_device_bound_callers_are_turned_away() -> None:
    message = r"^The reference solvers need `capturable=False`, got True: CVXPY runs on the host\. "
    with pytest.raises(ValueError, match=message):
        cvxpy_simplex_lp(*descent(gram_of("conflicting", 2)), capturable=True)
