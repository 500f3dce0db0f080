"""The law of ConFIG: equal cosines, and a length by choice."""

from collections.abc import Callable

import pytest
import torch
from cases import J2, J3, JR, conflicting, correlated, decades, normal, rows
from torch import Tensor

from gradbal import aggregate, make_rule

FAMILIES: dict[str, Callable[[int], Tensor]] = {
    "any": lambda m: normal(m, 4 * m + 8, seed=m),
    "conflicting": lambda m: conflicting(m, seed=m),
    "correlated": lambda m: correlated(m, seed=m),
    "six decades": lambda m: decades(m, seed=m),
}
LENGTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "min": torch.min,
    "max": torch.max,
    "arithmetic": torch.mean,
    "geometric": lambda norms: norms.log().mean().exp(),
    "harmonic": lambda norms: 1 / norms.reciprocal().mean(),
}


def cosines(jacobian: Tensor, direction: Tensor) -> Tensor:
    return jacobian @ direction / jacobian.norm(dim=1) / direction.norm()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_cosines_and_projected_length(family: str, m: int, scale: float) -> None:
    jacobian = scale * FAMILIES[family](m)
    direction = aggregate(jacobian, "config").direction
    found = cosines(jacobian, direction)
    assert found.min() > 0
    torch.testing.assert_close(found, found[:1].expand(m), rtol=1e-8, atol=0)
    projections = jacobian @ direction / direction.norm()
    torch.testing.assert_close(direction.norm(), projections.sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("model", LENGTHS)
@pytest.mark.parametrize("m", [1, 2, 3, 8])
def test_length_models(m: int, model: str) -> None:
    jacobian = torch.cat((decades(m, seed=m), torch.zeros(1, m + 5, dtype=torch.float64)))
    plain = aggregate(jacobian, "config").direction
    direction = aggregate(jacobian, make_rule("config", length_model=model)).direction
    torch.testing.assert_close(direction / direction.norm(), plain / plain.norm())
    expected = LENGTHS[model](jacobian[:-1].norm(dim=1)) * cosines(jacobian[:-1], plain).sum()
    torch.testing.assert_close(direction.norm(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("table", [J2, J3])
def test_cosines_follow_preferences(table: list[list[float]]) -> None:
    preferences = (1.0, 3.0, 0.0)[: len(table)]
    direction = aggregate(rows(table), make_rule("config", preferences=preferences)).direction
    found = cosines(rows(table), direction)
    torch.testing.assert_close(found / found[0], torch.tensor(preferences).double())


@pytest.mark.parametrize(
    "table", [J2, [[0, 0], [1, 2]], [[1, 2], [-1, -2]], [[1, 2], [2, 4]], [[1, 0], [-1, 1e-3]]]
)
def test_two_tasks_are_no_special_case(table: list[list[float]]) -> None:
    direct = aggregate(rows(table), "config").direction
    solved = aggregate(rows(table), make_rule("config", preferences=(1.0, 1.0))).direction
    torch.testing.assert_close(direct, solved, rtol=1e-9, atol=1e-9)


def test_least_squares_where_no_cosine_is_common() -> None:
    units = torch.nn.functional.normalize(rows(JR), dim=1)
    expected = torch.linalg.pinv(units).sum(dim=1)
    direction = aggregate(rows(JR), "config").direction
    torch.testing.assert_close(direction / direction.norm(), expected / expected.norm())


def test_no_harm_where_least_squares_would_do_some() -> None:
    harmed = 0
    for seed in range(40):
        jacobian = normal(4, 2, seed=seed) + rows([[1.2, 0]])
        units = torch.nn.functional.normalize(jacobian, dim=1)
        direction = aggregate(jacobian, "config").direction
        assert (units @ direction >= -1e-9 * jacobian.norm()).all()
        squares = torch.linalg.pinv(units).sum(dim=1)
        harmed += bool((units @ squares < -1e-6).any() and direction.norm() > 1e-3)
    assert harmed > 0
