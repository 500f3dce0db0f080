"""PCGrad and GradVac against slow versions on the vectors, in whatever order tasks are visited."""

from itertools import product
from typing import Any

import pytest
import reference
import torch
from cases import J2, J3, conflicting, decades, normal, rows
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.rules import gradvac, pcgrad

MATRICES = {
    "J2": rows(J2),
    "J3": rows(J3),
    "five": normal(5, 4, seed=1),
    "eight": conflicting(8, seed=2),
    "decades": decades(6, seed=3),
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Whom each task visited, one tensor per call."""
    found: list[Tensor] = []
    original = pcgrad.visits

    def recording(*args: Any) -> Tensor:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(pcgrad, "visits", recording)
    monkeypatch.setattr(gradvac, "visits", recording)
    return found


def orders_of(visits: Tensor) -> list[list[int]]:
    return [[int(task) for task in column] for column in visits.T]


@pytest.mark.parametrize("order", ["random", "given"])
@pytest.mark.parametrize("case", MATRICES)
def test_pcgrad_is_what_it_is_on_vectors(case: str, order: str, seen: list[Tensor]) -> None:
    jacobian, state = MATRICES[case], None
    for _ in range(3):
        result = aggregate(jacobian, make_rule("pcgrad", order=order), state=state)
        state = result.state
        orders = [[1], [0]] if len(jacobian) == 2 else orders_of(seen[-1])
        expected = reference.pcgrad(jacobian, orders)
        torch.testing.assert_close(result.direction, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", ["random", "given"])
@pytest.mark.parametrize("target", [0.0, 0.4, -0.2])
@pytest.mark.parametrize("case", MATRICES)
def test_gradvac_is_what_it_is_on_vectors(
    case: str, target: float, order: str, seen: list[Tensor]
) -> None:
    jacobian, state = MATRICES[case], None
    m = len(jacobian)
    targets = torch.full((m, m), target, dtype=torch.float64)
    rule = make_rule("gradvac", target=target, order=order, beta=0.3)
    for _ in range(3):
        result = aggregate(jacobian, rule, state=state)
        state = result.state
        expected, targets = reference.gradvac(jacobian, orders_of(seen[-1]), targets, 0.3)
        torch.testing.assert_close(result.direction, expected, rtol=1e-8, atol=1e-10)
        found = state["tensors"]["target"]
        torch.testing.assert_close(found, targets, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("m", [3, 4, 9])
def test_each_task_visits_every_other_once(m: int, seen: list[Tensor]) -> None:
    jacobian, state, orders = normal(m, 4), None, []
    for _ in range(20):
        state = aggregate(jacobian, "pcgrad", state=state).state
        assert seen[-1].shape == (m - 1, m)
        for task, others in enumerate(orders_of(seen[-1])):
            assert sorted([*others, task]) == list(range(m))
        orders.append(tuple(map(tuple, orders_of(seen[-1]))))
    assert len(set(orders)) > 1


def test_all_orders_of_three_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [(1, 2), (0, 2), (0, 1)]
    found = {}
    for turned in product([False, True], repeat=3):
        columns = [pair[::-1] if turn else pair for pair, turn in zip(others, turned, strict=True)]
        visits = torch.tensor(columns).T
        monkeypatch.setattr(pcgrad, "visits", lambda *args, visits=visits: visits)
        found[turned] = aggregate(rows(J3), "pcgrad")
    weights = [result.weights for result in found.values() if result.weights is not None]
    mean = torch.stack(weights).mean(dim=0)
    expected = torch.tensor([2.656385, 1.869048, 1.357143], dtype=torch.float64)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-6)
    reverse = found[True, True, True]
    expected = torch.tensor([3.311688, 3.159091, 4.694805, 5.496753], dtype=torch.float64)
    torch.testing.assert_close(reverse.direction, expected, rtol=0, atol=1e-6)


def test_gradvac_starts_as_pcgrad() -> None:
    for case in MATRICES.values():
        ours = aggregate(case, make_rule("gradvac", order="given")).direction
        theirs = aggregate(case, make_rule("pcgrad", order="given")).direction
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradvac_leaves_alone_what_is_similar_enough() -> None:
    jacobian = rows([[1, 0.5], [0.5, 1], [1, 1]])
    result = aggregate(jacobian, make_rule("gradvac", target=0.5))
    assert torch.equal(result.direction, jacobian.sum(dim=0))


def test_gradvac_stays_bounded_on_parallel_gradients() -> None:
    jacobian, state = rows([[1, 2], [2, 4], [0, 0]]), None
    for _ in range(60):
        result = aggregate(jacobian, "gradvac", state=state)
        state = result.state
        torch.testing.assert_close(result.direction, jacobian.sum(dim=0))
    targets = state["tensors"]["target"]
    assert (targets.abs() <= 1).all()
    assert torch.equal(targets[2], torch.zeros(3, dtype=torch.float64))
