"""Lightning's Trainer and Fabric, each against a loop written by hand."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from models import Toy, assert_same, data, frozen_copy
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from gradbal import MTLOptimizer

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors
BATCHES = 8


def losses_of(model: nn.Module, batch: int) -> dict[str, Tensor]:
    x = data(6, 4, seed=int(batch), dtype=torch.float32)
    return {f"t{k}": (y.float() - k).square().mean() for k, y in enumerate(model(x))}


def optimizer_of(model: nn.Module, rule: str, several: bool = False) -> MTLOptimizer:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    if several:
        return MTLOptimizer([torch.optim.Muon(matrices), torch.optim.AdamW(rest)], rule)
    return MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), rule)


class Task(L.LightningModule):
    """The recipe of the page on Lightning, automatic or manual."""

    def __init__(self, rule: str, automatic: bool = True, several: bool = False) -> None:
        super().__init__()
        self.model = Toy().float()
        self.rule, self.automatic_optimization, self.several = rule, automatic, several
        self.losses: dict[str, Tensor] = {}

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.model, self.rule, self.several)
        schedule = StepLR(optimizer, 2, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Tensor, number: int) -> Any:
        self.losses = losses_of(self.model, number)  # the loader starts anew when resumed
        if self.automatic_optimization:
            return sum(self.losses.values())
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        optimizer.zero_grad()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        optimizer.backward(self.losses, scaler=scaler)
        optimizer.step()
        schedule.step()
        self.log_dict(optimizer.metrics())
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.automatic_optimization:  # the gradients are unscaled by now
            self.clip_gradients(optimizer, gradient_clip_val=0.1)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        pieces = self.trainer.accumulate_grad_batches
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        losses = {name: loss / pieces for name, loss in self.losses.items()}
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.backward(losses, scaler=scaler)


def trainer(folder: Path, **options: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    return L.Trainer(**(settings | options))


def loader() -> Any:
    return DataLoader(range(BATCHES), batch_size=None)  # type: ignore[arg-type]  # has a length


def by_hand(
    rule: str,
    *,
    pieces: int = 1,
    clip: float | None = None,
    half: torch.dtype | None = None,
    **options: Any,
) -> tuple[Toy, MTLOptimizer]:
    model = Toy().float()
    optimizer = optimizer_of(model, rule, **options)
    schedule = StepLR(optimizer, 2, 0.5)
    scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=half == torch.float16)
    for batch in range(BATCHES):
        with torch.autocast("cpu", dtype=half, enabled=half is not None):
            losses = losses_of(model, batch)
        losses = {name: loss / pieces for name, loss in losses.items()}
        optimizer.backward(losses, scaler=scaler)
        if batch % pieces == pieces - 1:
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()
    return model, optimizer


@pytest.mark.parametrize("rule", ["ew", "upgrad", "uw"])
@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, {}),
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, {"pieces": 2, "clip": 0.1}),
        (
            {"precision": "bf16-mixed", "accumulate_grad_batches": 2},
            {"half": torch.bfloat16, "pieces": 2},
        ),
    ],
    ids=["plain", "clip", "accumulate", "bf16"],
)
def test_automatic_optimization(
    rule: str, options: dict[str, Any], alike: dict[str, Any], tmp_path: Path
) -> None:
    task = Task(rule)
    run = trainer(tmp_path, **options)
    run.fit(task, loader())
    model, optimizer = by_hand(rule, **alike)
    assert_same(task.model.parameters(), model.parameters(), 0)
    ours: Any = run.optimizers[0]
    assert isinstance(ours, MTLOptimizer)
    assert ours.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert frozen_copy(ours.core.contents()["state"]) == frozen_copy(
        optimizer.core.contents()["state"]
    )


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "uw"])
def test_float16_with_the_trainers_scaler(rule: str, automatic: bool, tmp_path: Path) -> None:
    """The Trainer scales a loss that is not used; ``backward`` takes its scaler."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10))
    task = Task(rule, automatic)
    clip = {"gradient_clip_val": 0.1} if automatic else {}
    trainer(tmp_path, plugins=[plugin], **clip).fit(task, loader())
    model, _ = by_hand(rule, clip=0.1, half=torch.float16)
    assert_same(task.model.parameters(), model.parameters(), 0)


def test_two_optimizers_as_one(tmp_path: Path) -> None:
    task = Task("upgrad", several=True)
    trainer(tmp_path).fit(task, loader())
    model, _ = by_hand("upgrad", several=True)
    assert_same(task.model.parameters(), model.parameters(), 0)


@pytest.mark.parametrize("rule", ["upgrad", "gradvac", "famo"])
def test_manual_optimization(rule: str, tmp_path: Path) -> None:
    task = Task(rule, automatic=False)
    run = trainer(tmp_path)
    run.fit(task, loader())
    model, _ = by_hand(rule, clip=0.1)
    assert_same(task.model.parameters(), model.parameters(), 0)
    assert run.global_step == BATCHES


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("rule", ["upgrad", "uw", "gradvac", "rlw", "famo"])
def test_checkpoint_and_resume(rule: str, automatic: bool, tmp_path: Path) -> None:
    """Stopped in the middle of the epoch, resumed by new objects: bit for bit as if it had not."""
    whole = Task(rule, automatic)
    straight = trainer(tmp_path)
    straight.fit(whole, loader())
    save = ModelCheckpoint(tmp_path, "middle", every_n_train_steps=4)
    trainer(tmp_path, callbacks=[save], enable_checkpointing=True, max_steps=4).fit(
        Task(rule, automatic), loader()
    )
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert set(saved["optimizer_states"][0]) == {"state", "param_groups", "gradbal"}
    rest = Task(rule, automatic)
    again = trainer(tmp_path)
    again.fit(rest, loader(), ckpt_path=tmp_path / "middle.ckpt")
    assert_same(rest.model.parameters(), whole.model.parameters(), 0)
    assert again.global_step == straight.global_step == BATCHES
    assert frozen_copy(again.optimizers[0].state_dict()) == frozen_copy(
        straight.optimizers[0].state_dict()
    )


def test_metrics_are_logged(tmp_path: Path) -> None:
    task = Task("upgrad", automatic=False)
    run = trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(task, loader())
    _, optimizer = by_hand("upgrad", clip=0.1)
    wanted = {name: float(value) for name, value in optimizer.metrics().items()}
    found = {name: float(value) for name, value in run.callback_metrics.items()}
    assert wanted == {name: pytest.approx(found[name], rel=1e-6) for name in wanted}
    assert {"gradbal/cos/t0/t1", "gradbal/weight/t2"} <= set(found)
    (file,) = tmp_path.glob("**/metrics.csv")
    assert "gradbal/weight/t0" in file.read_text()


@pytest.mark.parametrize("rule", ["upgrad", "uw", "gradvac"])
def test_fabric(rule: str, tmp_path: Path) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    net = Toy().float()
    wrapped = optimizer_of(net, rule)
    schedule = StepLR(wrapped, 2, 0.5)
    model, optimizer = fabric.setup(net, wrapped)
    for batch in range(BATCHES):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        schedule.step()
        if batch == 3:
            fabric.save(tmp_path / "all.ckpt", {"model": model, "optimizer": optimizer})
    straight, reference = by_hand(rule, clip=0.1)
    assert_same(net.parameters(), straight.parameters(), 0)
    assert frozen_copy(wrapped.state_dict()) == frozen_copy(reference.state_dict())
    other = Toy().float()
    second = optimizer_of(other, rule)
    model, optimizer = fabric.setup(other, second)
    fabric.load(tmp_path / "all.ckpt", {"model": model, "optimizer": optimizer})
    schedule = StepLR(second, 2, 0.5)
    schedule.last_epoch = 4
    second.param_groups[0]["lr"] = 0.01 / 4
    for batch in range(4, BATCHES):
        optimizer.zero_grad()
        optimizer.backward(losses_of(model, batch))
        fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        schedule.step()
    assert_same(other.parameters(), straight.parameters(), 0)
