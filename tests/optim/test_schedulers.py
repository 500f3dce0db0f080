"""Every learning rate scheduler of torch, around ours and around the plain optimizer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Toy, assert_same, frozen_copy
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from gradbal import MTLOptimizer

MAKE: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 5),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=0.9),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 5, 2.0),
    "SWALR": lambda o: SWALR(o, 0.02, anneal_epochs=3),
}
BASES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),  # its momentum is scheduled
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),  # its first beta is
}
OPTIONS = ["lr", "momentum", "betas", "initial_lr"]


def test_no_scheduler_is_left_out() -> None:
    assert set(MAKE) - {"SWALR"} == set(schedulers.__all__) - {"LRScheduler"}


def advance(schedule: Any, value: float) -> None:
    plateau = isinstance(schedule, schedulers.ReduceLROnPlateau)
    schedule.step(*([value] if plateau else []))


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [{k: g[k] for k in OPTIONS if k in g} for g in optimizer.param_groups]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MAKE)
def test_as_around_the_plain_optimizer(name: str, base: str) -> None:
    plain, ours = Toy(), Toy()
    optimizer = BASES[base](plain.parameters())
    mtl = MTLOptimizer(BASES[base](ours.parameters()), "ew")
    theirs, mine = MAKE[name](optimizer), MAKE[name](mtl)
    rates = []
    for batch in range(7):
        optimizer.zero_grad()
        total = sum(plain.losses(batch))
        total.backward()
        optimizer.step()
        advance(theirs, float(total.detach()))
        mtl.step(ours.losses(batch))
        advance(mine, float(total.detach()))
        assert options(mtl) == options(optimizer)
        assert mine.get_last_lr() == theirs.get_last_lr()
        rates.append(mtl.param_groups[0]["lr"])
    assert len(set(rates)) > 1
    assert_same(ours.parameters(), plain.parameters(), 0)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", MAKE)
def test_resumed_with_its_scheduler(name: str, base: str) -> None:
    """Saved after each step and loaded into objects made anew, as a script does."""

    def start() -> tuple[Toy, MTLOptimizer, Any]:
        model = Toy()
        optimizer = MTLOptimizer(BASES[base](model.parameters()), "uw")
        return model, optimizer, MAKE[name](optimizer)

    def step(run: tuple[Toy, MTLOptimizer, Any], batch: int) -> None:
        model, optimizer, schedule = run
        optimizer.step(model.losses(batch))
        advance(schedule, float(batch % 2))

    straight, stopped = start(), start()
    for batch in range(5):
        step(straight, batch)
        step(stopped, batch)
        states = copy.deepcopy([part.state_dict() for part in stopped])
        stopped = start()
        for part, state in zip(stopped, states, strict=True):
            part.load_state_dict(state)
        assert options(stopped[1]) == options(straight[1])
        assert_same(stopped[0].parameters(), straight[0].parameters(), 0)
    assert frozen_copy(stopped[1].state_dict()) == frozen_copy(straight[1].state_dict())


@pytest.mark.parametrize("average", ["mean", "ema"])
def test_averaged_weights(average: str) -> None:
    def train(ours: bool) -> Any:
        model = nn.Sequential(nn.BatchNorm1d(4).double(), Toy())
        toy = model[1]
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer: Any = MTLOptimizer(base, "ew") if ours else base
        swa = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn() if average == "ema" else None
        )
        schedule = SWALR(optimizer, 0.02, anneal_epochs=2)
        for batch in range(4):
            if ours:
                optimizer.step(toy.losses(batch))
            else:
                optimizer.zero_grad()
                sum(toy.losses(batch)).backward()
                optimizer.step()
            swa.update_parameters(model)
            schedule.step()
        update_bn([torch.ones(3, 4).double() * k for k in range(3)], swa)
        return swa

    assert_same(train(ours=True).state_dict().values(), train(ours=False).state_dict().values(), 0)
