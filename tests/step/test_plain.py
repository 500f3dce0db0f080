"""``rule="ew"`` is plain training: ``sum(losses).backward(); optimizer.step()``."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Toy, assert_same, data, grads, square, wrapped
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedulers

from gradbal import MTLOptimizer, make_rule


class Conv(nn.Module):
    """A channels-last convolutional trunk with two heads, in single precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        )
        self.heads = nn.ModuleList([nn.Conv2d(4, 2, 1), nn.Conv2d(4, 1, 1)])
        self.to(memory_format=torch.channels_last)

    def losses(self, batch: int = 0) -> list[Tensor]:
        x = data(4, 3, 8, 8, seed=batch, dtype=torch.float32)
        z = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return [square(head(z) - k) for k, head in enumerate(self.heads)]


def convolutional() -> Conv:
    with torch.random.fork_rng(devices=[]):
        return Conv()


MODELS: dict[str, Callable[[], Any]] = {"dense": Toy, "channels last": convolutional}
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "decay": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "step": lambda o: schedulers.StepLR(o, 2, 0.5),
    "onecycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=8),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5), schedulers.CosineAnnealingLR(o, 5)], [2]
    ),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.5),
}


def advance(schedule: Any, losses: list[Tensor]) -> None:
    if isinstance(schedule, schedulers.ReduceLROnPlateau):
        schedule.step(float(sum(losses).detach()))
    elif schedule is not None:
        schedule.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", MODELS)
def test_equal_weights_follow_plain_training(model: str, base: str, schedule: str) -> None:
    plain = MODELS[model]()
    ours = copy.deepcopy(plain)
    optimizer = BASES[base](plain.parameters())
    mtl = MTLOptimizer(BASES[base](ours.parameters()), "ew")
    theirs, mine = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](mtl)
    for batch in range(6):
        losses = plain.losses(batch)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        advance(theirs, losses)
        losses = ours.losses(batch)
        mtl.step(losses)
        advance(mine, losses)
        assert mtl.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    tol = 1e-12 if model == "dense" else 1e-5
    assert_same(ours.state_dict().values(), plain.state_dict().values(), tol)
    assert mtl.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("base", BASES)
def test_bit_for_bit_with_a_vector_of_losses(base: str) -> None:
    """One backward pass from the same node with the same seeds: not even the last bit differs."""
    plain, ours = Toy(2), Toy(2)
    optimizer = BASES[base](plain.parameters())
    mtl = MTLOptimizer(BASES[base](ours.parameters()), "ew")
    for batch in range(5):
        optimizer.zero_grad()
        sum(plain.losses(batch)).backward()
        optimizer.step()
        mtl.step(ours.losses(batch))
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("form", ["ours", "torch's"])
def test_lbfgs(search: str | None, form: str) -> None:
    plain, ours = Toy(), Toy()
    optimizer = torch.optim.LBFGS(plain.parameters(), lr=0.5, max_iter=6, line_search_fn=search)
    base = torch.optim.LBFGS(ours.parameters(), lr=0.5, max_iter=6, line_search_fn=search)
    mtl = MTLOptimizer(base, "ew")
    for batch in range(4):

        def theirs(batch: int = batch) -> Tensor:
            optimizer.zero_grad()
            total = sum(plain.losses(batch))
            total.backward()
            return total

        def mine(batch: int = batch) -> Any:
            losses = ours.losses(batch)
            if form == "ours":
                return losses
            mtl.zero_grad()
            mtl.backward(losses)
            return sum(losses)

        before = float(optimizer.step(theirs).detach())
        result = mtl.step(mine) if batch % 2 else mtl.step(closure=mine)
        assert float(result.detach()) == pytest.approx(before, rel=1e-9)
        assert_same(ours.parameters(), plain.parameters(), 1e-8)


def test_two_groups_with_different_learning_rates_and_freezing_in_between() -> None:
    plain, ours = Toy(), Toy()

    def groups(model: Toy) -> list[dict[str, Any]]:
        return [
            {"params": model.trunk.parameters(), "lr": 0.01},
            {"params": model.heads.parameters(), "lr": 0.1, "weight_decay": 0.1},
        ]

    optimizer = torch.optim.AdamW(groups(plain))
    mtl = MTLOptimizer(torch.optim.AdamW(groups(ours)), "ew")
    for batch in range(6):
        for model in (plain, ours):
            model.trunk[0].requires_grad_(batch < 2 or batch > 3)
        optimizer.zero_grad()
        sum(plain.losses(batch)).backward()
        optimizer.step()
        mtl.step(ours.losses(batch))
        assert_same(ours.parameters(), plain.parameters(), 1e-12)


def test_clipping_between_the_phases() -> None:
    plain, ours = Toy(), Toy()
    optimizer, mtl = BASES["adamw"](plain.parameters()), None
    mtl = MTLOptimizer(BASES["adamw"](ours.parameters()), "ew")
    for batch in range(4):
        optimizer.zero_grad()
        sum(plain.losses(batch)).backward()
        theirs = nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        optimizer.step()
        mtl.zero_grad()
        mtl.backward(ours.losses(batch))
        mine = nn.utils.clip_grad_norm_(ours.parameters(), 0.3)
        mtl.step()
        assert_same([mine], [theirs], 1e-12)
        assert_same(ours.parameters(), plain.parameters(), 1e-12)


def test_plain_accumulation_of_gradients() -> None:
    """Adding up ``.grad`` over micro-batches works as ever; for equal weights it is exact."""
    plain, ours = Toy(), Toy()
    optimizer = BASES["momentum"](plain.parameters())
    mtl = MTLOptimizer(BASES["momentum"](ours.parameters()), "ew")
    for batch in range(6):
        (sum(plain.losses(batch)) / 3).backward()
        mtl.backward([loss / 3 for loss in ours.losses(batch)])
        if batch % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
            mtl.step()
            mtl.zero_grad()
    assert_same(ours.parameters(), plain.parameters(), 1e-12)


@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 1 / 3)])
def test_reduction(reduction: str, factor: float) -> None:
    model, plain = Toy(), Toy()
    rule = make_rule("ew", reduction=reduction)
    wrapped(model, rule, scale="native").backward(model.losses())
    (factor * sum(plain.losses())).backward()
    assert_same(grads(model), grads(plain), 1e-14)
