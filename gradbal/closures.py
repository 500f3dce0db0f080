"""Evaluating the losses once more after a step, leaving no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradbal.losses import named_losses


class Evaluations:
    """A closure for the base optimizer around one from the user.

    If the user's returns losses, each evaluation writes gradients and returns the value they
    belong to. If it returns a scalar or None, it has done so itself, and nothing is added.

    Args:
        closure: The user's.
        evaluate: Writes gradients for losses and auxiliary losses, given how many times.
        aux: Auxiliary losses.
    """

    def __init__(
        self, closure: Callable[[], Any], evaluate: Callable[..., Tensor], aux: Any
    ) -> None:
        self.closure, self.evaluate, self.aux = closure, evaluate, aux
        self.count = 0

    def __call__(self) -> Any:
        """Evaluate once."""
        with torch.enable_grad():
            result = self.closure()
        if not is_losses(result):
            return result
        self.count += 1
        return self.evaluate(result, self.aux, self.count)


def is_losses(result: object) -> bool:
    """Say whether a closure returned losses rather than what torch's own closures return."""
    scalar = isinstance(result, Tensor) and result.ndim == 0
    return not (result is None or scalar or isinstance(result, int | float))


def losses_after(closure: Callable[[], Any]) -> tuple[list[str] | None, list[Tensor]]:
    """Evaluate the losses under ``no_grad``, leaving no trace."""
    with undisturbed(), torch.no_grad():
        names, losses = named_losses(closure())
        return names, [loss.detach().clone() for loss in losses]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put random numbers and buffers back afterwards.

    Buffers (running statistics, counters) are saved as the forward pass comes to a module, with
    those of its parts, so the model need not be known.
    """
    saved: dict[nn.Module, dict[str, tuple[Tensor, Tensor]]] = {}

    def save(module: nn.Module, args: object) -> None:
        if module not in saved:
            for part in module.modules():
                named = part.named_buffers(recurse=False)
                saved.setdefault(part, {name: (old, old.clone()) for name, old in named})

    handle = register_module_forward_pre_hook(save)
    try:
        with torch.random.fork_rng(devices=_devices()):
            yield
    finally:
        handle.remove()
        for module, buffers in saved.items():
            for name, (buffer, old) in buffers.items():
                setattr(module, name, buffer)
                buffer.data.copy_(old)  # without a new version: a graph may have saved it


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
