"""COSMOS is the gradient of its objective; drawn preferences follow a Dirichlet law."""

import math

import pytest
import torch
from cases import losses_for, normal, seeded
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules._base import Context, LossRule
from gradbal.step.weighting import MODEL

DRAWS = 10_000


def scalarized(losses: Tensor, preferences: Tensor, lam: float) -> Tensor:
    return preferences @ losses - lam * torch.cosine_similarity(preferences, losses, dim=0, eps=0)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("lam", [0.0, 0.01, 2.0])
@pytest.mark.parametrize("m", [1, 2, 3, 17])
def test_weights_are_the_gradient_of_the_objective(m: int, lam: float, size: float) -> None:
    preferences = losses_for(m, seed=1)
    for sample in (losses_for(m), normal(m, seed=2)):
        losses = (sample * size).requires_grad_()
        value = scalarized(losses, preferences / preferences.sum(), lam)
        (expected,) = torch.autograd.grad(value, losses)
        rule = make_rule("cosmos", lam=lam, preferences=tuple(preferences.tolist()))
        found = aggregate(torch.eye(m).double(), rule, losses=losses.detach()).weights
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * max(1, lam / size))


def test_value_of_the_sheet() -> None:
    value = scalarized(torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.2, 0.3, 0.5]), 2.0)
    assert abs(value + 0.499182) < 1e-6


def test_without_any_loss_only_the_preferences_are_left() -> None:
    rule = make_rule("cosmos", preferences=(1.0, 3.0))
    found = aggregate(torch.eye(2).double(), rule, losses=[0, 0]).weights
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75], dtype=torch.float64))


SLOW = [pytest.param(alpha, marks=pytest.mark.slow) for alpha in (1.0, 4.0)]


@pytest.mark.parametrize("alpha", [0.3, *SLOW])
def test_draws_follow_a_dirichlet_law(alpha: float) -> None:
    rule, m = make_rule("cosmos", alpha=alpha, lam=0.0), 3
    assert isinstance(rule, LossRule)
    losses = losses_for(m)
    ctx = Context(losses=losses, state=rule.init(losses), source=seeded(1))
    drawn = torch.stack([rule.weights(losses, ctx) for _ in range(DRAWS)][1:])
    variance = (1 / m) * (1 - 1 / m) / (m * alpha + 1)
    assert ((drawn.mean(dim=0) - 1 / m).abs() < 4 * math.sqrt(variance / DRAWS)).all()
    squares = (drawn - 1 / m).square()
    errors = (squares.var(dim=0) / DRAWS).sqrt()
    assert ((squares.mean(dim=0) - variance).abs() < 4 * errors).all()


def test_every_step_shows_the_preferences_of_the_next() -> None:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule = make_rule("cosmos", alpha=0.5, lam=0.0, preferences=(1.0, 2.0, 1.0))
    mtl_opt = MTLOptimizer(
        torch.optim.SGD([parameter], lr=0), rule, tasks=["a", "b", "c"], scale="native"
    )
    shown = {"a": 0.25, "b": 0.5, "c": 0.25}
    for here in ("abc", "abc", "ac", "b", "abc"):
        mtl_opt.step(dict.fromkeys(here, parameter * 2))
        assert mtl_opt.last is not None
        if set(shown) == set(here):
            expected = torch.tensor([shown[task] for task in here], dtype=torch.float64)
            torch.testing.assert_close(mtl_opt.last.weights, expected)
        assert mtl_opt.last.weights is not None
        assert abs(mtl_opt.last.weights.sum() - 1) < 1e-12
        stats = mtl_opt.last.stats[MODEL]
        shown = {task: stats[f"preference/{task}"].item() for task in here}
        assert abs(sum(shown.values()) - 1) < 1e-12
    assert mtl_opt.core.state[MODEL]["preferences"].shape == (3,)
