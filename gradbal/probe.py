"""A look at the losses at other parameters, leaving no trace."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradbal.closures import undisturbed
from gradbal.core import Core
from gradbal.losses import named_losses
from gradbal.rule import Closure, Probed


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
