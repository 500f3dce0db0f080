"""Plain STCH is the gradient of a smooth maximum, which keeps within its bounds."""

import math

import pytest
import torch
from cases import losses_for, normal
from torch import Tensor

from gradbal import aggregate, make_rule


def smooth_maximum(losses: Tensor, preferences: Tensor, ideal: Tensor, mu: float) -> Tensor:
    return mu * torch.logsumexp(preferences * (losses - ideal) / mu, dim=0)


@pytest.mark.parametrize("mu", [0.01, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("m", [1, 2, 3, 17])
def test_weights_are_the_gradient_of_the_objective(m: int, mu: float) -> None:
    losses = losses_for(m).requires_grad_()
    preferences, ideal = losses_for(m, seed=1) / m, normal(m, seed=2)
    value = smooth_maximum(losses, preferences, ideal, mu)
    largest = (preferences * (losses - ideal)).max()
    assert largest - 1e-12 <= value <= largest + mu * math.log(m) + 1e-12
    (expected,) = torch.autograd.grad(value, losses)
    rule = make_rule(
        "stch_plain",
        mu=mu,
        preferences=tuple(preferences.tolist()),
        ideal_point=tuple(ideal.tolist()),
    )
    found = aggregate(torch.eye(m).double(), rule, losses=losses.detach()).weights
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-300)


def test_between_the_worst_task_and_all_alike() -> None:
    losses, jacobian = [0.5, 2.0, 1.0], torch.eye(3).double()
    for mu, weights in [(1e-3, [0, 1 / 3, 0]), (1e12, [1 / 9] * 3)]:
        found = aggregate(jacobian, make_rule("stch_plain", mu=mu), losses=losses).weights
        torch.testing.assert_close(
            found, torch.tensor(weights, dtype=torch.float64), rtol=1e-9, atol=1e-100
        )


def test_value_of_the_sheet() -> None:
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    value = smooth_maximum(
        torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), third, 0 * third, 0.1
    )
    assert abs(value - 0.670820) < 1e-6
