"""PBI is the gradient of its objective, on the ray a subgradient."""

import pytest
import torch
from cases import losses_for, normal
from torch import Tensor

from gradbal import aggregate, make_rule


def boundary(losses: Tensor, preferences: Tensor, ideal: Tensor, theta: float) -> Tensor:
    ray = preferences / preferences.norm()
    excess = losses - ideal
    along = excess @ ray
    return along + theta * (excess - along * ray).norm()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("theta", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("m", [2, 3, 17])
def test_weights_are_the_gradient_of_the_objective(m: int, theta: float, size: float) -> None:
    losses = (losses_for(m) * size).requires_grad_()
    preferences, ideal = losses_for(m, seed=1), normal(m, seed=2) * size
    value = boundary(losses, preferences, ideal, theta)
    (expected,) = torch.autograd.grad(value, losses)
    rule = make_rule(
        "pbi",
        theta=theta,
        preferences=tuple(preferences.tolist()),
        ideal_point=tuple(ideal.tolist()),
    )
    found = aggregate(torch.eye(m).double(), rule, losses=losses.detach()).weights
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_value_of_the_sheet() -> None:
    losses = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    preferences = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    value = boundary(losses, preferences, 0 * losses, 5.0)
    assert abs(value - 7.989269) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("m", [1, 2, 5, 128])
def test_on_the_ray_only_the_way_along_it_counts(m: int, size: float) -> None:
    preferences = losses_for(m, seed=3)
    rule = make_rule("pbi", preferences=tuple(preferences.tolist()))
    found = aggregate(torch.eye(m).double(), rule, losses=0.7 * size * preferences).weights
    torch.testing.assert_close(found, preferences / preferences.norm())
