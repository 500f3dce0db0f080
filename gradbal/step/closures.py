"""Evaluate losses again, after the step or at other parameters, without side effects."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gradbal.graph.losses import named_losses
from gradbal.rules._base import Closure, Probed
from gradbal.step.state import Core


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
    here = get_ident()

    def save(module: nn.Module, args: object) -> None:
        if get_ident() == here and module not in saved:  # another thread may train another model
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


def probe(
    core: Core,
    tasks: Sequence[int],
    params: Sequence[Tensor],
    numbers: Sequence[int],
    direction: Sequence[Tensor],
    lr: float | Tensor,
    closure: Closure,
    weights: Tensor | None = None,
) -> Probed:
    """Evaluate losses at ``parameters - lr * direction`` and differentiate them there.

    Args:
        core: Knows the tasks by name.
        tasks: Numbers of the tasks whose losses are wanted, in this order.
        params: All parameters of the optimizer.
        numbers: The parameters to move and to differentiate by.
        direction: One tensor for each of these.
        lr: How far to go.
        closure: Returns the losses.
        weights: Combinations of the losses to differentiate, shape ``[k, m]``; None for each loss
            by itself.

    Returns:
        The losses, shape ``[m]``, float64, and for each parameter the gradients, ``[k, *shape]``.

    Raises:
        ValueError: If the closure returns losses of other tasks.
    """
    some = [params[number] for number in numbers]
    with undisturbed(), _moved(some, direction, lr), torch.enable_grad():
        losses = _ordered(core, tasks, closure())
        mixed = losses if weights is None else [*(weights.to(losses[0]) @ torch.stack(losses))]
        rows = [
            torch.autograd.grad(loss, some, retain_graph=loss is not mixed[-1], allow_unused=True)
            for loss in mixed
        ]
    columns = zip(*rows, strict=True) if rows else [()] * len(some)
    stacks = [
        torch.stack([_dense(grad, param) for grad in column]) if column else param.new_empty(0)
        for param, column in zip(some, columns, strict=True)
    ]
    return Probed(torch.stack([loss.detach() for loss in losses]).double(), stacks)


@contextmanager
def _moved(
    params: Sequence[Tensor], direction: Sequence[Tensor], lr: float | Tensor
) -> Iterator[None]:
    """Move parameters in place; then put the very same numbers back.

    Through ``.data``, so that graphs that the user keeps do not see a change of version.
    """
    data = [param.data for param in params]
    old = [tensor.clone() for tensor in data]
    try:
        with torch.no_grad():
            for tensor, part in zip(data, direction, strict=True):
                tensor.sub_(lr * part)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(data, old)


def _ordered(core: Core, tasks: Sequence[int], returned: object) -> list[Tensor]:
    """Return the losses of the tasks in their order."""
    names, losses = named_losses(returned)  # type: ignore[arg-type]  # it tells what is wrong
    known = [core.names.index(name) if name in core.names else -1 for name in names or ()]
    found = dict(zip(known if names else range(len(losses)), losses, strict=True))
    if not set(tasks) <= set(found):
        missing = ", ".join(repr(core.names[task]) for task in tasks if task not in found)
        raise ValueError(
            f"MTLOptimizer: a closure among the further batches returned no loss of {missing}; "
            "it must return those of the tasks of the step."
        )
    return [found[task].reshape(()) for task in tasks]


def _dense(grad: Tensor | None, param: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(param)
    return grad.to_dense() if grad.is_sparse else grad


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
