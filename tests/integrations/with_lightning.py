"""What the page on Lightning shows, in several processes."""

from pathlib import Path
from typing import Any

import lightning as L
from integrations.halves import BATCHES, CLIP, STOP, losses_of, optimizer_of, whole
from lightning.fabric.strategies import ModelParallelStrategy as FabricStrategy
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from models import Toy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

SIZES = {"data_parallel_size": 2, "tensor_parallel_size": 1}


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for part in (model.trunk, model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model


class Task(L.LightningModule):
    def __init__(self, rule: str, how: str, automatic: bool) -> None:
        super().__init__()
        self.model = Toy()
        self.rule, self.how, self.automatic_optimization = rule, how, automatic
        self.losses: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.how == "fsdp2":
            shard(self.model, self.device_mesh)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_of(self.model, self.rule)
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
        optimizer.backward(self.losses)
        self.clip_gradients(optimizer, gradient_clip_val=CLIP)
        optimizer.step()
        schedule.step()
        return None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        pieces = self.trainer.accumulate_grad_batches
        losses = {name: loss / pieces for name, loss in self.losses.items()}
        self.balancer.backward(losses)

    @property
    def balancer(self) -> Any:
        return self.optimizers(use_pl_optimizer=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradbal"] = self.balancer.core.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.how == "fsdp2":  # else the optimizer's state is loaded with all that is in it
            self.balancer.core.load_state_dict(checkpoint["gradbal"])


def trainer(how: str, folder: str, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(**SIZES) if how == "fsdp2" else how,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **{"enable_checkpointing": False, **options},
    )


def loader() -> Any:
    return DataLoader(range(BATCHES), batch_size=None)  # type: ignore[arg-type]  # has a length


def train(
    rule: str, how: str, folder: str, *, pieces: int = 1, automatic: bool = True
) -> list[Tensor]:
    """Train in this process and return the parameters.

    Args:
        rule: The rule.
        how: ``"ddp"`` or ``"fsdp2"``.
        folder: Where the trainer may write.
        pieces: In how many batches a step is taken.
        automatic: Whether the trainer steps the optimizer.
    """
    task = Task(rule, how, automatic)
    clip = {"gradient_clip_val": CLIP} if automatic else {}
    trainer(how, folder, accumulate_grad_batches=pieces, **clip).fit(task, loader())
    return whole(task.model.parameters())


def resume(rule: str, how: str, folder: str) -> list[Tensor]:
    """Train until some batch, save, and go on with new objects."""
    save = ModelCheckpoint(folder, "middle", every_n_train_steps=STOP)
    options = {"callbacks": [save], "enable_checkpointing": True, "max_steps": STOP}
    first = trainer(how, folder, gradient_clip_val=CLIP, **options)
    first.fit(Task(rule, how, True), loader())
    task = Task(rule, how, True)
    path = Path(folder, "middle.ckpt")
    trainer(how, folder, gradient_clip_val=CLIP).fit(task, loader(), ckpt_path=path)
    return whole(task.model.parameters())


def with_fabric(rule: str, how: str, folder: str) -> list[Tensor]:
    """Train with Fabric; save in the middle, and go on with new objects."""
    strategy: Any = FabricStrategy(shard, **SIZES) if how == "fsdp2" else how
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model: Any = None
    for batches in (range(STOP), range(STOP, BATCHES)):
        model = fabric.setup_module(Toy())
        mtl, schedule = optimizer_of(model, rule)
        optimizer = fabric.setup_optimizers(mtl)
        parts = {"model": model, "optimizer": optimizer}
        others = {"gradbal": mtl.core, "schedule": schedule}
        if batches.start:
            rest = fabric.load(folder, parts)
            for name, part in others.items():
                part.load_state_dict(rest[name])
        for batch in batches:
            optimizer.zero_grad()
            optimizer.backward(losses_of(model, batch))
            fabric.clip_gradients(model, optimizer, max_norm=CLIP)
            optimizer.step()
            schedule.step()
        if not batches.start:
            fabric.save(folder, {**parts, **others})
    return whole(model.parameters())
