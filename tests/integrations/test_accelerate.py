"""Accelerate: prepare, accumulate, clip, save and load, against a loop written by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from models import Toy, assert_same, data, frozen_copy
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from gradbal import MTLOptimizer

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors
PIECES, BATCHES = 2, 8


def start_anew() -> None:
    """Forget the settings that Accelerate keeps in the process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    yield
    start_anew()


def losses_of(model: nn.Module, batch: int) -> list[Tensor]:
    x = data(6, 4, seed=batch, dtype=torch.float32)
    return [(y.float() - k).square().mean() for k, y in enumerate(model(x))]


def start(rule: str, several: bool = False) -> tuple[Toy, MTLOptimizer, StepLR]:
    model = Toy().float()
    bases: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    if several:
        parts = (model.trunk.parameters(), model.heads.parameters())
        bases = [torch.optim.AdamW(part, lr=0.01) for part in parts]
    optimizer = MTLOptimizer(bases, rule)
    return model, optimizer, StepLR(optimizer, 2, 0.5)


def by_hand(rule: str, *, half: torch.dtype | None = None) -> tuple[Toy, MTLOptimizer]:
    model, optimizer, schedule = start(rule)
    scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=half == torch.float16)
    for batch in range(BATCHES):
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            losses = losses_of(model, batch)
        optimizer.backward([loss / PIECES for loss in losses], scaler=scaler)
        if batch % PIECES == PIECES - 1:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
    return model, optimizer


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, schedule: Any, batches: range
) -> None:
    """The recipe of the page on Accelerate."""
    pieces = accelerator.gradient_accumulation_steps
    for batch in batches:
        with accelerator.accumulate(model):
            losses = losses_of(model, batch)
            losses = [loss / pieces for loss in losses]
            optimizer.optimizer.backward(losses, scaler=accelerator.scaler)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("rule", ["ew", "upgrad", "uw", "gradvac", "famo"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_prepared_and_accumulated(rule: str, precision: str) -> None:
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=PIECES, mixed_precision=precision
    )
    model, mtl, schedule = start(rule)
    parts = accelerator.prepare(model, mtl, schedule)
    assert parts[1].optimizer is mtl
    train(accelerator, *parts, range(BATCHES))
    plain, reference = by_hand(rule, half=torch.bfloat16 if precision == "bf16" else None)
    assert_same(model.parameters(), plain.parameters(), 0)
    assert frozen_copy(mtl.state_dict()) == frozen_copy(reference.state_dict())


@pytest.mark.parametrize("rule", ["ew", "upgrad", "uw"])
def test_with_a_scaler(rule: str) -> None:
    """Accelerate makes one on a GPU only, so it is set up here as it is there."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PIECES)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", 2.0**10)
    model, mtl, schedule = start(rule)
    train(accelerator, *accelerator.prepare(model, mtl, schedule), range(BATCHES))
    plain, reference = by_hand(rule, half=torch.float16)
    assert_same(model.parameters(), plain.parameters(), 0)
    assert frozen_copy(mtl.state_dict()) == frozen_copy(reference.state_dict())


def test_two_optimizers_as_one() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PIECES)
    model, mtl, schedule = start("upgrad", several=True)
    train(accelerator, *accelerator.prepare(model, mtl, schedule), range(BATCHES))
    plain, _ = by_hand("upgrad")
    assert_same(model.parameters(), plain.parameters(), 0)


@pytest.mark.parametrize("rule", ["upgrad", "uw", "gradvac", "famo"])
def test_save_and_load(rule: str, tmp_path: Path) -> None:
    accelerator, stop = Accelerator(cpu=True, gradient_accumulation_steps=PIECES), 4
    parts = accelerator.prepare(*start(rule))
    train(accelerator, *parts, range(stop))
    accelerator.save_state(str(tmp_path))
    start_anew()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PIECES)
    model, mtl, schedule = start(rule)
    parts = accelerator.prepare(model, mtl, schedule)
    accelerator.load_state(str(tmp_path))
    train(accelerator, *parts, range(stop, BATCHES))
    plain, reference = by_hand(rule)
    assert_same(model.parameters(), plain.parameters(), 0)
    assert frozen_copy(mtl.state_dict()) == frozen_copy(reference.state_dict())


def test_rows_accumulated_in_the_core_are_saved(tmp_path: Path) -> None:
    """``accumulate=True``: the rule sees the whole batch, also if it is saved in between."""
    accelerator = Accelerator(cpu=True)
    model, mtl, schedule = start("upgrad")
    accelerator.prepare(model, mtl, schedule)
    mtl.backward([loss / 2 for loss in losses_of(model, 0)], accumulate=True)
    accelerator.save_state(str(tmp_path))
    other, second, schedule = start("upgrad")
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(other, second, schedule)
    accelerator.load_state(str(tmp_path))
    for net, optimizer in ((model, mtl), (other, second)):
        optimizer.step([loss / 2 for loss in losses_of(net, 1)])
    assert_same(other.parameters(), model.parameters(), 0)
    assert not torch.equal(model.trunk[0].weight, Toy().float().trunk[0].weight)
