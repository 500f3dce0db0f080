import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, GOLDEN, SIZES, draw, half_rank_stationary, rows, unit
from torch import Tensor

from gradbal.solvers import cvxpy_nash, min_norm, nash_point

WEIGHTS = {
    ("J2", 1.0): [1.232448, 0.551167],
    ("J3", 1.0): [0.622916, 0.400568, 0.253271],
    ("JR", 1.0): [0.707107, 0.437016, 1.144123],
    ("JP", 1.0): [0.284940, 0.264098, 0.212424],
    ("J2", 2.0): [1.210454, 0.503996],
    ("J3", 2.0): [0.491782, 0.289234, 0.181395],
    ("JR", 2.0): [0.777200, 0.241097, 1.228340],
    ("JP", 2.0): [0.193781, 0.172370, 0.119857],
    ("J2", 0.5): [1.259921, 0.629961],
    ("J3", 0.5): [0.791229, 0.557558, 0.370760],
    ("JP", 0.5): [0.427577, 0.409059, 0.362313],
}


def violation(jac: Tensor, weights: Tensor, alpha: float, demand: Tensor | float = 1.0) -> float:
    assert (weights > 0).all()
    return ((weights / demand) ** (1 / alpha) * (jac @ (weights @ jac)) - 1).abs().max().item()


def asked(m: int) -> Tensor:
    """Demands with a ratio of at most 4."""
    return 0.5 + 1.5 * torch.rand(m, generator=torch.Generator().manual_seed(m)).double()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equations(family: str, m: int, alpha: float) -> None:
    jac = draw(family, m)
    solution = nash_point(jac @ jac.T, alpha=alpha)
    assert solution.converged
    assert violation(jac, solution.value, alpha) <= 1e-9


def test_many_tasks() -> None:
    jac = draw("conflicting", 128)
    assert violation(jac, nash_point(jac @ jac.T).value, 1.0) <= 1e-9


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    m=st.integers(2, 64),
    alpha=st.floats(0.5, 10),
    exponent=st.floats(-12, 12),
)
def test_equations_with_demands(family: str, m: int, alpha: float, exponent: float) -> None:
    jac = 10**exponent * draw(family, m)
    solution = nash_point(jac @ jac.T, alpha=alpha, demand=asked(m))
    assert solution.converged
    assert violation(jac, solution.value, alpha, asked(m)) <= 1e-8


@pytest.mark.parametrize("m", [2, 3, 8, 16])
@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2, 20.0, 50.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_extreme_fairness(family: str, m: int, alpha: float) -> None:
    """Sides of an equation many decades apart, as far as a cosine can be told from zero."""
    jac = draw(family, m)
    solution = nash_point(jac @ jac.T, alpha=alpha, max_iter=200)
    assert solution.converged
    gains = unit(jac)[0] @ (solution.value @ jac)
    wanted = solution.value ** (-1 / alpha) / jac.norm(dim=1)
    length = (solution.value @ jac).norm()
    assert (gains - wanted).abs().max() <= 1e-8 * length


def test_large_alpha_is_the_worst_task_and_small_alpha_the_sum() -> None:
    jac = rows(GOLDEN["J3"])
    far = nash_point(jac @ jac.T, alpha=200.0, max_iter=400).value
    shortest = min_norm(jac @ jac.T).value
    torch.testing.assert_close(far / far.sum(), shortest, rtol=0, atol=0.01)
    near = nash_point(jac @ jac.T + 20, alpha=0.001, max_iter=400).value
    torch.testing.assert_close(near, torch.ones_like(near), rtol=0, atol=0.01)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("m", [2, 3, 16])
def test_hull_all_but_touches_zero(m: int, capturable: bool) -> None:
    """No ridge: 0 is ``3e-4`` from the hull, in units of the gradients."""
    jac = unit(half_rank_stationary(m, torch.Generator().manual_seed(m)))[0]
    jac = torch.cat((jac, torch.full((m, 1), 3e-4, dtype=torch.float64)), dim=1)
    solution = nash_point(jac @ jac.T, capturable=capturable)
    assert solution.converged
    assert violation(jac, solution.value, 1.0) <= 1e-8


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy(family: str, alpha: float) -> None:
    jac = draw(family, 6)
    reference = cvxpy_nash(jac @ jac.T, alpha=alpha)
    assert reference.converged
    found = nash_point(jac @ jac.T, alpha=alpha).value
    torch.testing.assert_close(found, reference.value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy_on_demands(family: str, alpha: float) -> None:
    jac = draw(family, 6)
    reference = cvxpy_nash(jac @ jac.T, alpha=alpha, demand=asked(6))
    assert reference.converged
    found = nash_point(jac @ jac.T, alpha=alpha, demand=asked(6)).value
    torch.testing.assert_close(found, reference.value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("name", "alpha"), WEIGHTS)
def test_golden_weights(name: str, alpha: float, capturable: bool) -> None:
    jac = rows(GOLDEN[name])
    found = nash_point(jac @ jac.T, alpha=alpha, capturable=capturable).value
    torch.testing.assert_close(found, rows([WEIGHTS[name, alpha]])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "alpha", "direction"),
    [
        ("one_row", 1.0, [0.6, 0.8]),
        ("one_row", 2.0, [0.350882, 0.467843]),
        ("zero_row", 1.0, [0.447214, 0.894427]),
        ("identical", 1.0, [0.774597, 1.549193]),
        ("all_zero", 1.0, [0, 0]),
    ],
)
def test_edge_cases(name: str, alpha: float, direction: list[float], capturable: bool) -> None:
    jac = rows(EDGES[name])
    solution = nash_point(jac @ jac.T, alpha=alpha, capturable=capturable)
    assert solution.converged
    torch.testing.assert_close(solution.value @ jac, rows([direction])[0], rtol=0, atol=1e-6)
    assert torch.equal(solution.value == 0, jac.norm(dim=1) == 0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["opposite", "opposite_and_one", "surrounded"])
def test_no_solution(name: str, alpha: float, capturable: bool) -> None:
    for size in (1e-6, 1.0, 1e6):
        jac = size * rows(EDGES[name])
        solution = nash_point(jac @ jac.T, alpha=alpha, capturable=capturable)
        assert not solution.converged
        assert (solution.value >= 0).all()
        torch.testing.assert_close(solution.value.sum().item(), 1.0)
        assert (solution.value @ jac).norm() <= 1e-12 * jac.norm()


@settings(derandomize=True, deadline=None, max_examples=40)
@given(m=st.integers(1, 9), decades=st.floats(0, 100), seed=st.integers(0, 999))
def test_the_bargain_ignores_the_scale_of_every_task(m: int, decades: float, seed: int) -> None:
    jac = draw("well_conditioned", m, seed)
    sizes = 10 ** torch.linspace(-decades, decades, m, dtype=torch.float64)
    scaled = jac * sizes.unsqueeze(1)
    found = nash_point(jac @ jac.T).value
    torch.testing.assert_close(nash_point(scaled @ scaled.T).value * sizes, found)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 2.0, 5.0])
def test_homogeneous(alpha: float) -> None:
    jac = draw("conflicting", 5)
    found = nash_point(jac @ jac.T, alpha=alpha).value
    for size in (1e-12, 1e12):
        scaled = nash_point(jac @ jac.T * size**2, alpha=alpha).value
        torch.testing.assert_close(scaled * size ** (2 * alpha / (1 + alpha)), found)


def test_alpha_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"^nash_point: `alpha` must be > 0, got 0\.$"):
        nash_point(torch.eye(2), alpha=0)
