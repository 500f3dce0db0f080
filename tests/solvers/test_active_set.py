"""Active sets alone, without the safe method that would make good what they miss."""

import numpy as np
import pytest
import scipy.optimize
import torch
from solver_cases import draw, unit

from gradbal.solvers.active_set import GATHER, eliminate, exchange, exchange_numbers


@pytest.mark.parametrize("m", [2, 8, GATHER - 1, GATHER, 30, 64])
@pytest.mark.parametrize("family", ["well_conditioned", "conflicting", "six_decades"])
def test_all_right_hand_sides_agree_with_nnls(family: str, m: int) -> None:
    directions, _ = unit(draw(family, m))
    cosines = directions @ directions.T
    points, residual, n_iter = exchange(cosines, cosines[:3], 1e-10, 30)
    assert residual <= 1e-10
    assert n_iter <= 10
    for point, row in zip(points, directions, strict=False):
        judge, _ = scipy.optimize.nnls(directions.T.numpy(), -row.numpy())
        torch.testing.assert_close(point, torch.from_numpy(judge), rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [2, 3, 8])
def test_plain_numbers_agree_with_nnls(m: int) -> None:
    directions, _ = unit(draw("well_conditioned", m))
    cosines = (directions @ directions.T).tolist()
    for row, linear in zip(directions, cosines, strict=True):
        point, residual, n_iter = exchange_numbers(cosines, linear, 1e-10)
        assert residual <= 1e-10
        assert n_iter <= 4
        judge, _ = scipy.optimize.nnls(directions.T.numpy(), -row.numpy())
        assert point == pytest.approx(judge.tolist(), abs=1e-9)


def test_signs_alone_decide_where_nothing_is_coupled() -> None:
    rows = draw("conflicting", 4)
    points, residual, n_iter = exchange(torch.eye(6, dtype=torch.float64), rows, 1e-10, 30)
    assert torch.equal(points, (-rows).clamp(min=0))
    assert (residual.item(), n_iter) == (0.0, 1)


def test_without_a_negative_entry_there_is_nothing_to_do() -> None:
    assert exchange_numbers([[1.0, 0.5], [0.5, 1.0]], [2.0, 0.0], 1e-10) == ([0.0, 0.0], 0.0, 0)


@pytest.mark.parametrize("free", [[0], [2, 0], [0, 1, 3], [0, 1, 2, 3]])
def test_elimination_agrees_with_lapack(free: list[int]) -> None:
    jac = draw("conflicting", 4)
    matrix, linear = (jac @ jac.T).numpy(), np.array([-1.0, 2.0, 0.5, -3.0])
    point = np.zeros(4)
    point[free] = np.linalg.solve(matrix[np.ix_(free, free)], -linear[free])
    assert eliminate(matrix.tolist(), linear.tolist(), free) == pytest.approx(point, rel=1e-10)


def test_entries_without_curvature_stay_zero() -> None:
    assert eliminate([[4.0, 0.0], [0.0, 0.0]], [-2.0, -1.0], [0, 1]) == [0.5, 0.0]
