"""Gradients that ``fully_shard`` holds back are refused: of one task they cannot be told."""

import pytest
import torch
from distributed.pool import Pool
from distributed.training import Net, batch, losses_of, part_of, spread_out
from models import says

from gradbal import MTLOptimizer


def refused(rule: str, engine: str) -> None:
    model = Net(pair=False).double()
    spread_out(model, "fsdp")
    optimizer = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule, engine=engine)
    model.set_requires_gradient_sync(False)  # type: ignore[operator]  # of FSDP
    data = part_of(batch(0, 16, torch.float64))
    losses = losses_of(model(data["x"], data["i"]), data)
    says(
        RuntimeError,
        "MTLOptimizer: a backward pass left no gradient in any sharded parameter; fully_shard "
        "holds them back after set_requires_gradient_sync(False), so keep it True (Accelerate "
        "does in GradientAccumulationPlugin(num_steps, sync_each_batch=True)).",
        lambda: optimizer.backward(losses),
    )
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(
    ("rule", "engine"),
    [("ew", "auto"), ("upgrad", "sequential"), ("upgrad", "representation")],
)
def test_it_is_refused(rule: str, engine: str, two: Pool) -> None:
    two(refused, rule, engine)
