"""Schedule-free optimizers as a base: their modes pass through, their state is saved."""

from collections.abc import Callable
from typing import Any

import pytest
import schedulefree
import torch
from models import Toy, assert_same

from gradbal import MTLOptimizer

Make = Callable[[Any], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "AdamW": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, warmup_steps=2),
    "SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1),
    "RAdam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01),
}


@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_equal_weights_are_plain_training(make: Make) -> None:
    plain, ours = Toy(), Toy()
    optimizer: Any = make(plain.parameters())
    mtl: Any = MTLOptimizer(make(ours.parameters()), "ew")
    for batch in range(4):
        for one in (optimizer, mtl):
            one.train()
        optimizer.zero_grad()
        sum(plain.losses(batch)).backward()
        optimizer.step()
        mtl.step(ours.losses(batch))
        assert_same(ours.parameters(), plain.parameters(), 0)
        for one in (optimizer, mtl):
            one.eval()
        assert_same(ours.parameters(), plain.parameters(), 0)


@pytest.mark.parametrize("rule", ["upgrad", "uw"])
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_stop_and_go_on(make: Make, rule: str) -> None:
    straight, stopped = Toy(), Toy()
    ours: Any = MTLOptimizer(make(straight.parameters()), rule)
    other: Any = MTLOptimizer(make(stopped.parameters()), rule)
    for model, optimizer in ((straight, ours), (stopped, other)):
        optimizer.train()
        for batch in range(2):
            optimizer.step(model.losses(batch))
        optimizer.eval()
    again = Toy(seed=1)
    resumed: Any = MTLOptimizer(make(again.parameters()), rule)
    again.load_state_dict(stopped.state_dict())
    resumed.load_state_dict(other.state_dict())
    for model, optimizer in ((straight, ours), (again, resumed)):
        optimizer.train()
        for batch in range(2, 4):
            optimizer.step(model.losses(batch))
        optimizer.eval()
    assert_same(again.parameters(), straight.parameters(), 0)
