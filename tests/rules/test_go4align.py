"""GO4Align's groups are the best of all partitions, and the same for any order of tasks."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from cases import losses_for, normal, seeded
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.rules.go4align import cluster_means


def partitions(values: Tensor, groups: int) -> Iterator[Tensor]:
    """Every way to put the numbers into at most so many groups, as means."""
    for labels in itertools.product(range(groups), repeat=len(values)):
        means = values.clone()
        for label in set(labels):
            members = torch.tensor([other == label for other in labels])
            means[members] = values[members].mean()
        yield means


@pytest.mark.parametrize("groups", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("m", [1, 2, 3, 5, pytest.param(6, marks=pytest.mark.slow)])
def test_clusters_are_the_best_of_all_partitions(m: int, groups: int) -> None:
    for seed in range(4):
        for values in (normal(m, seed=seed), 10 ** (3 * normal(m, seed=seed))):
            costs = [(values - means).square().sum() for means in partitions(values, groups)]
            found = (values - cluster_means(values, groups)).square().sum()
            torch.testing.assert_close(found, min(costs), rtol=1e-9, atol=0)


def cost_of_intervals(values: Tensor, groups: int) -> float:
    """Return the least cost of so many intervals of the sorted numbers, one by one."""
    ordered, m = values.sort().values, len(values)

    def cost(start: int, end: int) -> float:
        return (ordered[start:end] - ordered[start:end].mean()).square().sum().item()

    best = [0.0] + [math.inf] * m
    for _ in range(groups):
        best = [
            min((best[start] + cost(start, end) for start in range(end)), default=math.inf)
            for end in range(m + 1)
        ]
    return best[m]


@pytest.mark.parametrize(("m", "groups"), [(40, 2), (30, 7), (128, 2)])
def test_clusters_of_many(m: int, groups: int) -> None:
    values = normal(m, seed=m) + 4 * torch.randint(groups, (m,), generator=seeded(groups))
    found = cluster_means(values, groups)
    assert len(found.unique()) == groups
    cost = (values - found).square().sum().item()
    assert cost == pytest.approx(cost_of_intervals(values, groups), rel=1e-9)


def test_nothing_cancels_among_numbers_that_are_nearly_equal() -> None:
    values = torch.tensor([1.0, 1 + 1e-12, 1 + 5e-12, 1 + 6e-12, 1e6], dtype=torch.float64)
    found = cluster_means(values, 3)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[1] < found[2] < found[4]


def test_equal_risks_need_no_group_of_their_own() -> None:
    values = torch.tensor([2.0, 1.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    for groups in (2, 3, 5, 9):
        torch.testing.assert_close(cluster_means(values, groups), values, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_do_not_depend_on_the_order_of_tasks(groups: int) -> None:
    rule, m = make_rule("go4align", beta=0.1, groups=groups), 7
    jacobian, order = torch.eye(m).double(), torch.randperm(m, generator=seeded(0))
    ours = theirs = None
    for step in range(5):
        losses = losses_for(m, seed=step)
        first = aggregate(jacobian, rule, losses=losses, state=ours)
        second = aggregate(jacobian, rule, losses=losses[order], state=theirs)
        ours, theirs = first.state, second.state
        assert first.weights is not None
        torch.testing.assert_close(second.weights, first.weights[order], rtol=1e-12, atol=0)
        assert len(first.weights.unique()) <= groups
