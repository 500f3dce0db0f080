import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, GOLDEN, SIZES, draw, half_rank_stationary, rows, unit
from torch import Tensor

from gradbal.solvers import cvxpy_min_norm, min_norm, touches_zero

WEIGHTS = {
    "J2": [0.722222, 0.277778],
    "J3": [0.547718, 0.273859, 0.178423],
    "JR": [0.4, 0, 0.6],
    "JP": [0.486957, 0.408696, 0.104348],
}


def violation(jac: Tensor, weights: Tensor) -> float:
    """How far ``g_i d >= d d``, equal where there is weight, fails; relative to both lengths."""
    assert (weights >= 0).all()
    assert abs(weights.sum().item() - 1) <= 1e-14
    directions, norms = unit(jac)
    d = weights @ jac
    excess = (directions @ d - d @ d / norms) / d.norm()
    shares = weights * norms / d.norm()
    return torch.minimum(shares, excess).abs().max().item()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_optimality_conditions(family: str, m: int, capturable: bool) -> None:
    jac = draw(family, m)
    solution = min_norm(jac @ jac.T, capturable=capturable)
    assert solution.converged
    assert violation(jac, solution.value) <= 1e-10


def test_many_tasks() -> None:
    jac = draw("half_rank", 128)
    assert violation(jac, min_norm(jac @ jac.T).value) <= 1e-10


@pytest.mark.parametrize("m", [3, 8, 40])
def test_stationary_points(m: int) -> None:
    jac = half_rank_stationary(m, torch.Generator().manual_seed(0))
    gram = jac @ jac.T
    solution = min_norm(gram)
    assert solution.converged
    assert touches_zero(gram, solution.value)
    assert (solution.value @ jac).norm() <= 1e-12 * jac.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy(family: str) -> None:
    jac = draw(family, 6)
    reference = cvxpy_min_norm(jac @ jac.T)
    assert reference.converged
    found, judge = min_norm(jac @ jac.T).value @ jac, reference.value @ jac
    torch.testing.assert_close(found, judge, rtol=0, atol=1e-6 * judge.norm().item())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_golden_weights(name: str, capturable: bool) -> None:
    jac = rows(GOLDEN[name])
    found = min_norm(jac @ jac.T, capturable=capturable).value
    torch.testing.assert_close(found, rows([WEIGHTS[name]])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("one_row", [3, 4]),
        ("zero_row", [0, 0]),
        ("zero_row_of_three", [0, 0]),
        ("identical", [1, 2]),
        ("parallel", [1, 2]),
        ("opposite", [0, 0]),
        ("opposite_and_one", [0, 0]),
        ("surrounded", [0, 0]),
        ("all_zero", [0, 0]),
    ],
)
def test_edge_cases(name: str, direction: list[float], capturable: bool) -> None:
    jac = rows(EDGES[name])
    solution = min_norm(jac @ jac.T, capturable=capturable)
    assert solution.converged
    assert (solution.value >= 0).all()
    torch.testing.assert_close(solution.value.sum().item(), 1.0)
    torch.testing.assert_close(solution.value @ jac, rows([direction])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("capturable", [False, True])
def test_zero_rows_share_evenly(capturable: bool) -> None:
    jac = rows(EDGES["two_zero_rows"])
    solution = min_norm(jac @ jac.T, capturable=capturable)
    torch.testing.assert_close(solution.value, rows([[0.5, 0, 0.5, 0]])[0], rtol=0, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
def test_contained_task_gets_everything(capturable: bool) -> None:
    jac = rows([[1, 0], [2, 1]])
    found = min_norm(jac @ jac.T, capturable=capturable).value
    torch.testing.assert_close(found, rows([[1, 0]])[0], rtol=0, atol=0)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(m=st.integers(1, 9), exponent=st.integers(-150, 150), seed=st.integers(0, 999))
def test_scale_and_order_play_no_part(m: int, exponent: int, seed: int) -> None:
    jac = draw("well_conditioned", m, seed)
    found = min_norm(jac @ jac.T).value
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    scaled = jac[order] * 10.0**exponent
    torch.testing.assert_close(min_norm(scaled @ scaled.T).value, found[order], rtol=1e-9, atol=0)


def test_not_square() -> None:
    with pytest.raises(ValueError, match=r"^`gram` must have shape \[m, m\], got \[2, 3\]\.$"):
        min_norm(torch.zeros(2, 3))
