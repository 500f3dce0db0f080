"""PMTL: what its direction lowers, its initial phase, and where it leads."""

from typing import Any

import pytest
import torch
from cases import FIVE, conflicting, decades, losses_for, normal, rows, seeded, wells
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.rules._base import Rule
from gradbal.solvers import cvxpy_min_norm


def sides_of(vectors: Tensor, index: int) -> Tensor:
    units = vectors / vectors.norm(dim=1, keepdim=True)
    return units - units[index]


def default(m: int) -> Tensor:
    return torch.cat((torch.eye(m), torch.ones(1, m))).double()


def drawn(count: int, m: int, seed: int) -> Tensor:
    return torch.rand(count, m, generator=seeded(seed), dtype=torch.float64)


def with_vectors(vectors: Tensor, index: int, **options: Any) -> Rule:
    return make_rule(
        "pmtl", preferences=tuple(map(tuple, vectors.tolist())), index=index, **options
    )


@pytest.mark.parametrize("m", [2, 3, 8])
def test_lowers_every_loss_and_every_active_constraint(m: int) -> None:
    for seed in range(12):
        jacobian = (conflicting, decades)[seed % 2](m, seed=seed)
        vectors, losses = drawn(5, m, seed), losses_for(m, seed=seed) ** 2
        far = int((sides_of(vectors, 0) @ losses).argmin())  # from the losses
        direction = aggregate(jacobian, with_vectors(vectors, far), losses=losses).direction
        sides = sides_of(vectors, far)
        hull = torch.cat((jacobian, (sides @ jacobian)[sides @ losses > 0]))
        assert len(hull) == m + 4
        excess = hull @ direction - direction @ direction
        assert (excess >= -1e-8 * hull.norm(dim=1) * direction.norm()).all()


@pytest.mark.parametrize("m", [2, 3, 6])
def test_is_the_shortest_vector_of_the_hull(m: int) -> None:
    for seed in range(6):
        jacobian, vectors = conflicting(m, seed=seed), drawn(4, m, seed)
        losses = losses_for(m, seed=seed) ** 2
        sides = sides_of(vectors, -1)
        hull = torch.cat((jacobian, (sides @ jacobian)[sides @ losses > 0]))
        expected = cvxpy_min_norm(hull @ hull.T).value @ hull
        for solver in ("exact", "cvxpy"):
            rule = with_vectors(vectors, -1, solver=solver)
            found = aggregate(jacobian, rule, losses=losses).direction
            size = hull.norm(dim=1).max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_inside_the_sector_it_is_mgda(m: int) -> None:
    jacobian, losses = conflicting(m, seed=3), torch.full((m,), 2.0, dtype=torch.float64)
    found = aggregate(jacobian, "pmtl", losses=losses)
    expected = aggregate(jacobian, "mgda")
    torch.testing.assert_close(found.direction, expected.direction)
    nothing = aggregate(torch.zeros(m, 3), make_rule("pmtl", solver="cvxpy"), losses=losses)
    assert nothing.direction.tolist() == [0, 0, 0]
    lone = with_vectors(drawn(1, m, 0), 0)
    torch.testing.assert_close(
        aggregate(jacobian, lone, losses=losses_for(m)).direction, expected.direction
    )


@pytest.mark.parametrize("m", [2, 4])
def test_the_default_is_the_axes_and_their_middle(m: int) -> None:
    jacobian, losses = conflicting(m, seed=1), losses_for(m) ** 3
    ours = aggregate(jacobian, "pmtl", losses=losses).direction
    theirs = aggregate(jacobian, with_vectors(7 * default(m), -1), losses=losses).direction
    torch.testing.assert_close(ours, theirs)


def test_the_initial_phase_looks_at_constraints_alone() -> None:
    jacobian = rows([[1, 0], [-0.2, 1]])
    outside, inside = torch.tensor([0.1, 9.0]), torch.tensor([1.0, 1.1])
    sides = sides_of(default(2), -1)
    rule = make_rule("pmtl", initial_steps=2)
    plain = aggregate(jacobian, "pmtl", losses=outside).direction
    first = aggregate(jacobian, rule, losses=outside)
    active = (sides @ outside.double() > 0).nonzero().squeeze(1)
    assert len(active) == 1
    torch.testing.assert_close(first.direction, sides[active[0]] @ jacobian)
    second = aggregate(jacobian, rule, losses=outside, state=first.state)
    torch.testing.assert_close(second.direction, first.direction)
    third = aggregate(jacobian, rule, losses=outside, state=second.state)
    torch.testing.assert_close(third.direction, plain)  # the phase has come to its end
    reached = aggregate(jacobian, rule, losses=inside, state=first.state)
    torch.testing.assert_close(reached.direction, aggregate(jacobian, "mgda").direction)
    after = aggregate(jacobian, rule, losses=outside, state=reached.state)
    torch.testing.assert_close(after.direction, plain)  # and does not come back


def test_tasks_without_gradient_take_no_part() -> None:
    jacobian = conflicting(4, seed=1)
    jacobian[1] = 0
    others, losses = [0, 2, 3], losses_for(4) ** 2
    losses[1] = 1e9
    vectors = drawn(4, 4, 5)
    found = aggregate(jacobian, with_vectors(vectors, 2), losses=losses)
    assert found.weights is not None
    assert found.weights[1] == 0
    alone = aggregate(jacobian[others], with_vectors(vectors[:, others], 2), losses=losses[others])
    torch.testing.assert_close(found.weights[others], alone.weights)


@pytest.mark.parametrize("gradients", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_units_play_no_part(gradients: float, size: float) -> None:
    for seed in range(5):
        jacobian, losses = decades(3, seed=seed), losses_for(3, seed=seed) ** 2
        found = aggregate(jacobian * gradients, "pmtl", losses=losses * size).weights
        expected = aggregate(jacobian, "pmtl", losses=losses).weights
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("index", [1, 2, 3])
def test_reaches_the_front_in_its_sector(index: int) -> None:
    point, state = 0.5 * normal(6, seed=index), None
    rule = make_rule("pmtl", preferences=FIVE, index=index, initial_steps=80)
    for _ in range(250):
        losses, jacobian = wells(point, 2)
        result = aggregate(jacobian, rule, losses=losses, state=state)
        point, state = point - 0.1 * result.direction, result.state
    losses, jacobian = wells(point, 2)
    assert (sides_of(torch.tensor(FIVE).double(), index) @ losses <= 0.02 * losses.norm()).all()
    assert aggregate(jacobian, "mgda").direction.norm() <= 1e-4


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"preferences": ((1.0, 0.0), (1.0,))},
            ValueError,
            "PMTL: `preferences` must be vectors with one number for each task, got lengths "
            "[1, 2].",
        ),
        (
            {"preferences": ()},
            ValueError,
            "PMTL: `preferences` must be vectors with one number for each task, got lengths [].",
        ),
        (
            {"preferences": ((1.0, -1.0),)},
            ValueError,
            "PMTL: `preferences` must be >= 0, got -1.0.",
        ),
        (
            {"preferences": ((0.0, 0.0),)},
            ValueError,
            "PMTL: `preferences` must be > 0, got 0.0.",
        ),
        (
            {"preferences": ((1.0, 0.0), (0.0, 1.0)), "index": 2},
            ValueError,
            "PMTL: `index` must be between -2 and 1, got 2.",
        ),
        ({"index": 0.5}, TypeError, "PMTL: `index` must be an int, got 0.5."),
        ({"initial_steps": -1}, ValueError, "PMTL: `initial_steps` must be >= 0, got -1."),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error) as caught:
        make_rule("pmtl", **options)
    assert str(caught.value) == sentence


def test_an_index_beyond_the_default_vectors() -> None:
    with pytest.raises(ValueError, match=r"^PMTL: `index` must be between -3 and 2, got 3\.$"):
        aggregate(normal(2, 3), make_rule("pmtl", index=3), losses=[1, 2])


def test_preferences_for_other_tasks() -> None:
    sentence = r"^PMTL: `preference_columns` must have one number for each of the 3 tasks, got 2\.$"
    with pytest.raises(ValueError, match=sentence):
        aggregate(normal(3, 3), make_rule("pmtl", preferences=FIVE), losses=[1, 2, 3])
