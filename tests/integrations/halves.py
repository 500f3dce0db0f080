"""A small training that two processes do on halves of each batch, and one on the whole of it."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from models import Toy, data
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

from gradbal import MTLOptimizer

BATCHES, STOP, CLIP = 8, 4, 0.1


def losses_of(model: Any, batch: int) -> dict[str, Tensor]:
    """Return the mean losses over this process' half, or over all if there is no other."""
    x = data(8, 4, seed=int(batch))
    if dist.is_initialized():
        x = x.chunk(dist.get_world_size())[dist.get_rank()]
    return {f"t{k}": (y - k).square().mean() for k, y in enumerate(model(x))}


def optimizer_of(model: nn.Module, rule: str) -> tuple[MTLOptimizer, StepLR]:
    optimizer = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), rule)
    return optimizer, StepLR(optimizer, 2, 0.5)


def start(rule: str) -> tuple[Toy, MTLOptimizer, StepLR]:
    model = Toy()
    return model, *optimizer_of(model, rule)


def by_hand(
    rule: str, *, pieces: int = 1, accumulate: bool = False, ticks: int = 1
) -> list[Tensor]:
    """Train in one process and return the parameters.

    Args:
        rule: The rule.
        pieces: In how many batches a step is taken.
        accumulate: Whether the rule sees them as one batch.
        ticks: How often the schedule is stepped with the optimizer.
    """
    model, optimizer, schedule = start(rule)
    for batch in range(BATCHES):
        last = batch % pieces == pieces - 1
        losses = {name: loss / pieces for name, loss in losses_of(model, batch).items()}
        optimizer.backward(losses, accumulate=accumulate and not last)
        if last:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            for _ in range(ticks):
                schedule.step()
            optimizer.zero_grad()
    return whole(model.parameters())


def whole(params: Iterable[Any]) -> list[Tensor]:
    """Return all of each parameter, in every process."""
    full = (param.full_tensor() if hasattr(param, "full_tensor") else param for param in params)
    return [param.detach().clone() for param in full]
