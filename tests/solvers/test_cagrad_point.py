from importlib import import_module
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, GOLDEN, SIZES, draw, half_rank_stationary, rows, unit
from torch import Tensor

from gradbal.solvers import cagrad_point, cvxpy_cagrad, touches_zero

DIRECTIONS = {
    ("J2", 0.4): [-0.653590, 0.5, 0.846410],
    ("J3", 0.4): [0.977395, 0.322031, 1, 1.344636],
    ("JR", 0.4): [0.4, 0.933333],
    ("JP", 0.4): [1.639893, 2.056560, 1.407742, 0.991076],
    ("J2", 0.5): [-0.566987, 0.5, 0.933013],
    ("J3", 0.5): [1.092840, 0.488067, 1.030947, 1.271440],
    ("JR", 0.5): [0.333333, 1],
    ("JP", 0.5): [1.799954, 2.216621, 1.461096, 1.044429],
}
MODULE = import_module("gradbal.solvers.cagrad")
WEIGHTS = {("J2", 0.4): [1, 0], ("J2", 0.5): [1, 0], ("J3", 0.5): [0.927385, 0.072615, 0]}


def direction(jac: Tensor, c: float, weights: Tensor) -> Tensor:
    mean, leaning = jac.mean(dim=0), weights @ jac
    return mean + c * mean.norm() / leaning.norm() * leaning


def violation(jac: Tensor, c: float, weights: Tensor) -> float:
    """How far weight lies elsewhere than on the tasks that gain least, relative to lengths."""
    assert (weights >= 0).all()
    assert abs(weights.sum().item() - 1) <= 1e-14
    directions, norms = unit(jac)
    gains = directions @ direction(jac, c, weights) / jac.mean(dim=0).norm()
    shares = weights * norms / (weights @ jac).norm() * c
    level = (shares @ gains) / (shares / norms).sum()  # of the gains g_i d
    return torch.minimum(shares, gains - level / norms).abs().max().item()


@pytest.mark.parametrize("c", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_optimality_conditions(family: str, m: int, c: float) -> None:
    jac = draw(family, m)
    solution = cagrad_point(jac @ jac.T, c)
    assert solution.converged
    assert violation(jac, c, solution.value) <= 1e-10


def fails(*args: object) -> NoReturn:
    raise AssertionError("this method is not needed here")


@pytest.mark.parametrize("m", [2, 3, 8, 16, 40, 64])
@pytest.mark.parametrize(
    ("family", "c", "most"),
    [
        ("well_conditioned", 0.05, 3),
        ("conflicting", 0.05, 3),
        ("six_decades", 0.05, 3),
        ("well_conditioned", 0.5, 4),
        ("well_conditioned", 0.95, 4),
    ],
)
def test_active_sets_settle_in_a_few_rounds(
    family: str, c: float, most: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The support of the best single task is nearly right where the ball is small."""
    monkeypatch.setattr(MODULE, "_interior_point", fails)
    for seed in range(4):
        jac = draw(family, m, seed)
        solution = cagrad_point(jac @ jac.T, c)
        assert solution.n_iter <= most
        assert violation(jac, c, solution.value) <= 1e-10


@pytest.mark.parametrize("m", [2, 3, 8, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_interior_point_on_the_host(family: str, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where active sets find nothing, it goes on until it has converged, and no further."""
    monkeypatch.setattr(MODULE, "_exchange", lambda problem, *_: (problem.near, torch.ones(()), 1))
    monkeypatch.setattr(MODULE, "_polish", lambda problem, points, free: points)
    monkeypatch.setattr(MODULE, "_on_set", lambda problem, free, **_: (free.double(), None))
    jac = draw(family, m)
    solution = cagrad_point(jac @ jac.T, 0.5, tol=1e-7)
    assert solution.converged
    assert 0 < solution.n_iter < 30
    assert violation(jac, 0.5, solution.value) <= 1e-6


@pytest.mark.parametrize("family", ["conflicting", "six_decades"])
def test_many_tasks(family: str) -> None:
    jac = draw(family, 128)
    assert violation(jac, 0.5, cagrad_point(jac @ jac.T, 0.5).value) <= 1e-10


@pytest.mark.parametrize("m", [2, 3, 8, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_interior_point(family: str, m: int) -> None:
    jac = draw(family, m)
    solution = cagrad_point(jac @ jac.T, 0.5, capturable=True)
    assert solution.converged
    assert violation(jac, 0.5, solution.value) <= 1e-10


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_hull_all_but_touches_zero(seed: int, capturable: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    jac = unit(half_rank_stationary(8, generator))[0]
    jac = torch.cat((jac, torch.full((8, 1), 2e-4, dtype=torch.float64)), dim=1)
    solution = cagrad_point(jac @ jac.T, 0.5, capturable=capturable)
    assert solution.converged
    assert violation(jac, 0.5, solution.value) <= 1e-8


@pytest.mark.parametrize("c", [0.1, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy(family: str, c: float) -> None:
    jac = draw(family, 6)
    reference = cvxpy_cagrad(jac @ jac.T, c)
    assert reference.converged
    found, judge = (
        direction(jac, c, w) for w in (cagrad_point(jac @ jac.T, c).value, reference.value)
    )
    torch.testing.assert_close(found, judge, rtol=0, atol=1e-4 * judge.norm().item())
    assert (jac @ found).min() >= (jac @ judge).min() - 1e-12 * judge.norm() * jac.norm()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(("name", "c"), DIRECTIONS)
def test_golden_directions(name: str, c: float, capturable: bool) -> None:
    jac = rows(GOLDEN[name])
    weights = cagrad_point(jac @ jac.T, c, capturable=capturable).value
    judge = rows([DIRECTIONS[name, c]])[0]
    torch.testing.assert_close(direction(jac, c, weights), judge, rtol=0, atol=1e-6)
    if (name, c) in WEIGHTS:
        torch.testing.assert_close(weights, rows([WEIGHTS[name, c]])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "judge"),
    [
        ("one_row", [4.5, 6]),
        ("zero_row", None),
        ("identical", [1.5, 3]),
        ("parallel", [2.25, 4.5]),
        ("opposite", None),
        ("all_zero", None),
    ],
)
def test_edge_cases(name: str, judge: list[float] | None, capturable: bool) -> None:
    """``None``: the minimum lies where the weighted gradients cancel; the rule returns 0."""
    jac = rows(EDGES[name])
    gram = jac @ jac.T
    solution = cagrad_point(gram, 0.5, capturable=capturable)
    assert solution.converged
    assert (solution.value >= 0).all()
    torch.testing.assert_close(solution.value.sum().item(), 1.0)
    assert touches_zero(gram, solution.value) == (judge is None)
    if judge is not None:
        found = direction(jac, 0.5, solution.value)
        torch.testing.assert_close(found, rows([judge])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("name", "judge"), [("opposite_and_one", [0, 1, 0]), ("surrounded", [0, 0.5, 0.5, 0, 0])]
)
def test_stationary_point_with_a_minimum_below_zero(
    name: str, judge: list[float], capturable: bool
) -> None:
    """The hull holds 0, and yet the problem has its usual solution."""
    jac = rows(EDGES[name])
    solution = cagrad_point(jac @ jac.T, 0.5, capturable=capturable)
    torch.testing.assert_close(solution.value, rows([judge])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("m", [3, 16])
def test_without_a_ball_the_first_of_the_worst_tasks(m: int) -> None:
    jac = draw("conflicting", m)
    weights, _, n_iter, _ = cagrad_point(jac @ jac.T, 0.0)
    assert n_iter == 0
    assert weights.argmax() == (jac @ jac.mean(dim=0)).argmin()
    assert weights.max() == 1


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    m=st.integers(1, 9),
    c=st.floats(0.01, 3),
    exponent=st.integers(-150, 150),
    seed=st.integers(0, 999),
)
def test_scale_and_order_play_no_part(m: int, c: float, exponent: int, seed: int) -> None:
    jac = draw("conflicting", m, seed)
    found = cagrad_point(jac @ jac.T, c).value
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    scaled = jac[order] * 10.0**exponent
    again = cagrad_point(scaled @ scaled.T, c).value
    torch.testing.assert_close(again, found[order], rtol=0, atol=1e-9)


def test_radius_below_zero() -> None:
    with pytest.raises(ValueError, match=r"^cagrad_point: `c` must be >= 0, got -0\.5\.$"):
        cagrad_point(torch.eye(2), -0.5)
