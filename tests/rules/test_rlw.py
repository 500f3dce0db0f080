"""The law of RLW: exchangeable on the simplex, with the moments of a softmax of normals."""

import math

import pytest
import torch
from cases import seeded
from torch import Tensor

from gradbal import aggregate
from gradbal.rules._base import Context, LossRule
from gradbal.rules._registry import RULES

DRAWS = 20_000


def draws(m: int) -> Tensor:
    rule = RULES["rlw"].rule()
    assert isinstance(rule, LossRule)
    losses = torch.ones(m, dtype=torch.float64)
    ctx = Context(losses=losses, state={}, source=seeded(m))
    found = [rule.weights(losses, ctx) for _ in range(DRAWS)]
    assert all(isinstance(weights, Tensor) for weights in found)
    return torch.stack(found)  # type: ignore[arg-type]  # checked one line above


@pytest.mark.parametrize(("m", "variance"), [(2, 0.068419), (3, 0.049411)])
def test_mean_and_variance(m: int, variance: float) -> None:
    weights = draws(m)
    error = math.sqrt(variance / DRAWS)
    assert ((weights.mean(dim=0) - 1 / m).abs() <= 4 * error).all()
    squares = (weights - 1 / m).square()
    errors = (squares.var(dim=0) / DRAWS).sqrt()
    assert ((squares.mean(dim=0) - variance).abs() <= 4 * errors).all()


def test_every_step_draws_anew() -> None:
    jacobian = torch.eye(3, dtype=torch.float64)
    first = aggregate(jacobian, "rlw")
    second = aggregate(jacobian, "rlw", state=first.state)
    assert first.weights is not None
    assert second.weights is not None
    assert not torch.equal(first.weights, second.weights)
