"""LDC-MTL: weights and slopes are the gradients of one objective."""

from typing import Any

import pytest
import torch
from cases import losses_for, normal
from torch import Tensor

from gradbal import MTLOptimizer, make_rule
from gradbal.rules._base import LossRule
from gradbal.step.state import Core
from gradbal.step.weighting import MODEL


def objective(losses: Tensor, logits: Tensor, lam: float, tau: Tensor) -> Tensor:
    parts = torch.softmax(logits, dim=0) * losses / tau
    return parts.sum() + lam * (parts[:-1] - parts[1:]).abs().sum()


@pytest.mark.parametrize("lam", [0.0, 0.05, 2.0])
@pytest.mark.parametrize("m", [1, 2, 3, 17])
def test_weights_and_slopes_are_gradients(m: int, lam: float) -> None:
    losses, logits = losses_for(m).requires_grad_(), normal(m, seed=4).requires_grad_()
    tau = losses_for(m, seed=1)
    rule = make_rule("ldc_mtl", lam=lam, tau=tuple(tau.tolist()))
    assert isinstance(rule, LossRule)
    core = Core(rule, tasks=m, learner="adam", seed=0)
    ctx = core.context(MODEL, range(m), losses.detach())
    ctx.state["logits"] = logits.detach()
    weights = rule.weights(losses.detach(), ctx)
    expected = torch.autograd.grad(objective(losses, logits, lam, tau), (losses, logits))
    torch.testing.assert_close(weights, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ctx.slopes["logits"], expected[1], rtol=1e-12, atol=1e-14)


def test_value_of_the_sheet() -> None:
    losses, shares = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.2, 0.3, 0.5])
    assert abs(objective(losses, shares.log(), 0.1, torch.ones(3)) - 1.26) < 1e-6


def steps(losses: list[dict[str, float]], lr: float = 0.1, **options: Any) -> MTLOptimizer:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule = make_rule("ldc_mtl", **options)
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule, learned_lr=lr)
    for values in losses:
        mtl_opt.step({name: value * parameter for name, value in values.items()})
    return mtl_opt


def test_first_losses_are_each_task_s_own() -> None:
    mtl_opt = steps([{"a": 2.0}, {"a": 3.0, "b": 5e8}, {"a": 1.0, "b": 7.0}], tau="first")
    torch.testing.assert_close(
        mtl_opt.core.state[MODEL]["tau"],
        torch.tensor([2.0, 5e8], dtype=torch.float64),
        rtol=0,
        atol=0,
    )


def test_first_losses_take_units_away() -> None:
    trajectory = [losses_for(3, seed=seed).tolist() for seed in range(6)]
    factors = (1e-12, 1.0, 3e20)
    ours = steps([dict(zip("abc", x, strict=True)) for x in trajectory], tau="first")
    theirs = steps(
        [{n: f * v for n, f, v in zip("abc", factors, x, strict=True)} for x in trajectory],
        tau="first",
    )
    found = [opt.core.state[MODEL]["logits"] for opt in (ours, theirs)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
    assert found[0].abs().max() > 0


def test_parts_are_brought_to_one_level() -> None:
    mtl_opt = steps([{"a": 1.0, "b": 10.0, "c": 4.0}] * 400, lr=2e-3, lam=5.0)
    shares = torch.softmax(mtl_opt.core.state[MODEL]["logits"], dim=0)
    parts = shares * torch.tensor([1.0, 10.0, 4.0], dtype=torch.float64)
    assert parts.max() < 1.1 * parts.min()


def test_first_losses_must_be_positive() -> None:
    sentence = r"^LDCMTL: losses must be > 0, got 0 for task 'b'; shift the loss"
    with pytest.raises(ValueError, match=sentence):
        steps([{"a": 2.0, "b": 0.0}], tau="first")
