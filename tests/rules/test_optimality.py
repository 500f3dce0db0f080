"""Rules that are optimisation problems: their conditions, a reference solver, their symmetries."""

import math
from collections.abc import Callable

import pytest
import reference
import torch
from cases import J3, conflicting, correlated, decades, normal, rank_deficient, rows, seeded
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.solvers import cvxpy_min_norm, equilibrate

TOL = 1e-8
FAMILIES: dict[str, Callable[[int], Tensor]] = {
    "any": lambda m: normal(m, 4 * m + 8, seed=m),
    "conflicting": lambda m: conflicting(m, seed=m),
    "correlated": lambda m: correlated(m, seed=m),
    "six decades": lambda m: decades(m, seed=m),
}
SCALES = [1e-8, 1.0, 1e8]
SOLVED = {
    "mgda": {},
    "upgrad": {},
    "cagrad": {"rescale": None},
    "nash_mtl": {"max_norm": None},
    "dualproj": {},
    "fairgrad": {},
    "pivrg": {},
}


def one_hot(m: int, task: int) -> tuple[float, ...]:
    return tuple(float(i == task) for i in range(m))


def weights_of(jacobian: Tensor, name: str, **options: object) -> Tensor:
    weights = aggregate(jacobian, make_rule(name, **options)).weights
    assert weights is not None
    return weights


def projection_residual(jacobian: Tensor) -> float:
    m = len(jacobian)
    residuals = []
    for task in range(0, m, 1 + m // 4):
        preferences = one_hot(m, task)
        weights = weights_of(jacobian, "upgrad", preferences=preferences)
        wanted = torch.tensor(preferences, dtype=torch.float64)
        residuals.append(reference.projection_residual(jacobian, wanted, weights))
    return max(residuals)


def mean_residual(jacobian: Tensor) -> float:
    mean = torch.full((len(jacobian),), 1 / len(jacobian), dtype=torch.float64)
    return reference.projection_residual(jacobian, mean, weights_of(jacobian, "dualproj"))


def informed_residual(jacobian: Tensor) -> float:
    scores = torch.linspace(-5, 10, len(jacobian), dtype=torch.float64)
    demand = len(jacobian) * (scores * math.log(2) / 15).softmax(0)
    weights = weights_of(jacobian, "pivrg", scores=tuple(scores.tolist()))
    return reference.nash_residual(jacobian, weights, 2.0, demand)


def bisector_residual(jacobian: Tensor) -> float:
    norms = jacobian.norm(dim=1)
    weights = weights_of(jacobian, "edm")
    return reference.min_norm_residual(jacobian / norms[:, None], weights * norms)


RESIDUALS: dict[str, Callable[[Tensor], float]] = {
    "mgda": lambda jac: reference.min_norm_residual(jac, weights_of(jac, "mgda")),
    "upgrad": projection_residual,
    "cagrad": lambda jac: reference.cagrad_residual(
        jac, weights_of(jac, "cagrad", rescale=None), 0.4
    ),
    "nash_mtl": lambda jac: reference.nash_residual(
        jac, weights_of(jac, "nash_mtl", max_norm=None)
    ),
    "fairgrad": lambda jac: reference.nash_residual(jac, weights_of(jac, "fairgrad"), 2.0),
    "pivrg": informed_residual,
    "dualproj": mean_residual,
    "edm": bisector_residual,
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("m", [2, 3, 8, 64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RESIDUALS)
def test_conditions_of_optimality(name: str, family: str, m: int, scale: float) -> None:
    assert RESIDUALS[name](FAMILIES[family](m) * scale) <= TOL


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("m", [2, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SOLVED)
def test_same_as_the_reference(name: str, family: str, m: int, scale: float) -> None:
    jacobian = FAMILIES[family](m) * scale
    ours = weights_of(jacobian, name, **SOLVED[name])
    theirs = weights_of(jacobian, name, **SOLVED[name], solver="cvxpy")
    norms = jacobian.norm(dim=1)
    gap = (jacobian.T @ (ours - theirs)).norm()
    assert gap <= 2e-6 * (ours.abs() * norms).sum()


@pytest.mark.parametrize("name", RESIDUALS)
def test_conditions_on_dependent_rows(name: str) -> None:
    assert RESIDUALS[name](rank_deficient(8, 4, seed=5)) <= 1e-6


def test_cagrad_between_the_mean_and_the_shortest() -> None:
    jacobian = rows(J3)
    mean = aggregate(jacobian, make_rule("cagrad", c=0.0)).direction
    torch.testing.assert_close(mean, jacobian.mean(dim=0))
    far = aggregate(jacobian, make_rule("cagrad", c=1e4, rescale=None)).direction
    shortest = aggregate(jacobian, "mgda").direction
    cosine = torch.cosine_similarity(far, shortest, dim=0)
    assert cosine > 1 - 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_nash_has_a_length_and_no_scale(seed: int) -> None:
    jacobian = normal(5, 9, seed=seed)
    rule = make_rule("nash_mtl", max_norm=None)
    direction = aggregate(jacobian, rule).direction
    assert abs(direction @ direction - 5) <= 1e-7
    factors = 10 ** (8 * torch.rand(5, 1, generator=seeded(seed), dtype=torch.float64) - 4)
    scaled = aggregate(jacobian * factors, rule).direction
    torch.testing.assert_close(scaled, direction, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_upgrad_is_linear_in_the_lengths(seed: int) -> None:
    jacobian = normal(4, 5, seed=seed)
    a, b = 10 ** (4 * torch.rand(2, 4, 1, generator=seeded(seed), dtype=torch.float64) - 2)
    parts = [aggregate(factor * jacobian, "upgrad").direction for factor in (a, b, a + b)]
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("preferences", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3), (0.0, 0.0, 2.0)])
def test_upgrad_weighs_projections(preferences: tuple[float, ...]) -> None:
    jacobian = rows(J3)
    single = [aggregate(jacobian, make_rule("upgrad", preferences=one_hot(3, k))) for k in range(3)]
    whole = aggregate(jacobian, make_rule("upgrad", preferences=preferences)).direction
    parts = sum(p * part.direction for p, part in zip(preferences, single, strict=True))
    torch.testing.assert_close(whole, parts)


@pytest.mark.parametrize("name", ["upgrad", "cagrad"])
@pytest.mark.parametrize("scale", [1e-3, 1e-9, 1e-30])
def test_small_gradients_are_balanced_as_large_ones(name: str, scale: float) -> None:
    large, small = aggregate(rows(J3), name), aggregate(rows(J3) * scale, name)
    torch.testing.assert_close(small.direction / scale, large.direction, rtol=1e-9, atol=0)
    assert (rows(J3) @ large.direction > 0).all()
    assert not torch.allclose(large.direction, rows(J3).mean(dim=0), rtol=0.1)


@pytest.mark.parametrize("ratio", [10, 30, 100, 1e3, 1e6])
def test_upgrad_protects_the_short_gradient(ratio: float) -> None:
    jacobian = rows([[1, 0], [-ratio, ratio]])
    direction = aggregate(jacobian, "upgrad").direction
    expected = torch.tensor([0.25, ratio / 2 + 0.25], dtype=torch.float64)
    torch.testing.assert_close(direction, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("m", [2, 3, 6])
def test_imtl_g_projects_equally(m: int) -> None:
    jacobian = correlated(m, seed=m) * 10 ** torch.linspace(-2, 2, m, dtype=torch.float64)[:, None]
    result = aggregate(jacobian, "imtl_g")
    projections = jacobian @ result.direction / jacobian.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(m), rtol=1e-9, atol=0)
    assert result.weights is not None
    assert abs(result.weights.sum() - 1) <= 1e-12


def test_imtl_g_never_ascends() -> None:
    fell_back = 0
    for seed in range(60):
        norms = 10 ** (2 * torch.rand(3, 1, generator=seeded(seed), dtype=torch.float64) - 1)
        jacobian = norms * torch.nn.functional.normalize(normal(3, 4, seed=seed), dim=1)
        gram = jacobian @ jacobian.T
        raw = torch.linalg.solve(gram, norms[:, 0])
        result = aggregate(jacobian, "imtl_g")
        assert (jacobian @ result.direction > 0).all()
        if raw.sum() < 0:
            fell_back += 1
            cosines, lengths = equilibrate(gram)
            shortest = cvxpy_min_norm(cosines).value / lengths
            expected = jacobian.T @ (shortest / shortest.sum())
            torch.testing.assert_close(result.direction, expected, rtol=1e-5, atol=1e-7)
    assert fell_back > 0


@pytest.mark.parametrize("gap", [0.5, 0.01, 1e-4, 0.0])
def test_imtl_g_on_opposed_tasks(gap: float) -> None:
    direction = aggregate(rows([[1, 2], [-1 - gap, -2 - 2 * gap]]), "imtl_g").direction
    torch.testing.assert_close(direction, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-7)
