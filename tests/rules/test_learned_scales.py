"""Learned scales on losses in different units: no weight collapses, and every task learns."""

import pytest
import torch
from models import PUBLISHED, data
from torch import nn

from gradbal import MTLOptimizer
from gradbal.solvers.log_weight import log_weight_step

UNITS = (1.0, 100.0, 1e4)


def fitted(rule: object, base: type[torch.optim.Optimizer], lr: float) -> list[float]:
    """Return what part of its first loss each task still has after training."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 32), nn.Tanh()).double()
    heads = nn.ModuleList(nn.Linear(32, 1) for _ in UNITS).double()
    x = data(64, 4)
    targets = [unit * (x @ data(4, 1, seed=i + 1)) for i, unit in enumerate(UNITS)]
    optimizer = MTLOptimizer(base([*trunk.parameters(), *heads.parameters()], lr=lr), rule)
    first: list[float] = []
    for _ in range(300):
        z = trunk(x)
        # outputs in the unit of the target, as a network with a fixed output scale has them
        losses = [
            (unit * head(z) - y).square().mean()
            for unit, head, y in zip(UNITS, heads, targets, strict=True)
        ]
        first = first or [loss.item() for loss in losses]
        optimizer.step(losses)
    return [loss.item() / start for loss, start in zip(losses, first, strict=True)]


@pytest.mark.parametrize("rule", ["uw", "imtl_l", "imtl"])
@pytest.mark.parametrize(("base", "lr"), [(torch.optim.SGD, 0.01), (torch.optim.Adam, 0.01)])
def test_every_task_learns(rule: str, base: type[torch.optim.Optimizer], lr: float) -> None:
    assert max(fitted(rule, base, lr)) < 0.2


def test_the_published_update_stops_a_task_with_a_large_loss_for_good() -> None:
    remaining = fitted(PUBLISHED["uw"], torch.optim.SGD, 0.01)
    assert not all(part < 0.5 for part in remaining)


@pytest.mark.parametrize("rate", [1e-4, 0.1, 1.0, 30.0])
def test_a_proximal_step_solves_its_equation_and_never_overshoots(rate: float) -> None:
    product = torch.logspace(-30, 300, 200, dtype=torch.float64)
    step = log_weight_step(product, rate)
    inside = product.log() + step  # log of weight times loss after the step
    residual = step - rate * (1 - inside.exp())
    assert (residual.abs() <= 1e-12 * (1 + rate + step.abs() * rate * inside.exp())).all()
    assert (step * product.log() <= 1e-12).all()  # towards 1
    assert (inside * product.log() >= -1e-9).all()  # and not beyond


def test_no_learning_rate_is_no_step() -> None:
    steps = log_weight_step(torch.tensor([0.0, 1.0, 1e9]).double(), 0.0)
    torch.testing.assert_close(steps, torch.zeros(3).double(), rtol=0, atol=1e-300)
