"""What the page on Accelerate shows, in several processes."""

import os
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from integrations.halves import BATCHES, CLIP, STOP, losses_of, start, whole
from torch import Tensor


def accelerator_for(how: str, pieces: int, *, sync: bool = True) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())  # Lightning deletes it when it ends
    window = GradientAccumulationPlugin(num_steps=pieces, sync_each_batch=sync)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=window)
    if how == "fsdp2":  # of the plugin it takes no notice without a GPU
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Sequential"],
        )
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator


def train(
    rule: str, how: str, *, pieces: int = 1, accumulate: bool = False, sync: bool = True
) -> list[Tensor]:
    """Train in this process and return the parameters.

    Args:
        rule: The rule.
        how: ``"ddp"`` or ``"fsdp2"``.
        pieces: In how many batches a step is taken.
        accumulate: Whether the rule sees them as one batch.
        sync: Whether gradients are reduced in every piece.
    """
    accelerator = accelerator_for(how, pieces, sync=sync)
    model, *rest = accelerator.prepare(*start(rule))
    run(accelerator, model, *rest, range(BATCHES), accumulate=accumulate)
    return whole(model.parameters())


def resume(rule: str, how: str, folder: str) -> list[Tensor]:
    """Train until some batch, save, and go on with new objects."""
    model: Any = None
    for batches in (range(STOP), range(STOP, BATCHES)):
        accelerator = accelerator_for(how, 1)
        model, optimizer, schedule = accelerator.prepare(*start(rule))
        if how == "fsdp2":
            accelerator.register_for_checkpointing(optimizer.optimizer.core)
        if batches.start:
            accelerator.load_state(folder)
        run(accelerator, model, optimizer, schedule, batches)
        if not batches.start:
            accelerator.save_state(folder)
    return whole(model.parameters())


def run(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    schedule: Any,
    batches: range,
    *,
    accumulate: bool = False,
) -> None:
    pieces = accelerator.gradient_accumulation_steps
    for batch in batches:
        with accelerator.accumulate(model):
            losses = {name: loss / pieces for name, loss in losses_of(model, batch).items()}
            aside = accumulate and not accelerator.sync_gradients
            optimizer.optimizer.backward(losses, accumulate=aside)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
