"""IGB weighs logarithms by what is left of the base losses, once these are known."""

import pytest
import torch
from cases import losses_for

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.step.weighting import MODEL


@pytest.mark.parametrize("m", [1, 2, 3, 17])
def test_weights_are_the_gradient_of_the_objective(m: int) -> None:
    losses, base = losses_for(m).requires_grad_(), losses_for(m, seed=1)
    held = m * torch.softmax(losses.detach() / base, dim=0)
    (expected,) = torch.autograd.grad(held @ losses.log(), losses)
    rule = make_rule("igb", base_losses=tuple(base.tolist()))
    found = aggregate(torch.eye(m).double(), rule, losses=losses.detach()).weights
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert found is not None
    assert abs(found @ losses.detach() - m) < 1e-12 * m


@pytest.mark.parametrize("base_epoch", [0, 1, 2])
def test_base_losses_are_averages_over_one_epoch(base_epoch: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule = make_rule("igb", base_epoch=base_epoch)
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule)
    for epoch in range(4):
        for batch in range(2):
            losses = losses_for(3, seed=10 * epoch + batch)
            mtl_opt.step([loss * parameter for loss in losses])
            factors = torch.ones(3).double()
            if epoch > base_epoch:
                pair = [losses_for(3, seed=10 * base_epoch + i) for i in range(2)]
                base = torch.stack(pair).mean(dim=0)
                torch.testing.assert_close(mtl_opt.core.state[MODEL]["base_losses"], base)
                factors = 3 * torch.softmax(losses / base, dim=0)
            assert mtl_opt.last is not None
            torch.testing.assert_close(mtl_opt.last.weights, factors / losses)
        mtl_opt.end_epoch()


def test_a_task_without_base_loss_does_not_disturb_the_others() -> None:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule = make_rule("igb", base_epoch=0, window=1)
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule)
    mtl_opt.step({"a": 1 * parameter, "b": 2 * parameter})
    mtl_opt.step({"a": 3 * parameter, "b": 2 * parameter, "c": 4 * parameter})
    assert mtl_opt.last is not None
    known = 2 * torch.softmax(torch.tensor([3.0, 1.0], dtype=torch.float64), dim=0)
    expected = torch.tensor([known[0] / 3, known[1] / 2, 1 / 4], dtype=torch.float64)
    torch.testing.assert_close(mtl_opt.last.weights, expected)
