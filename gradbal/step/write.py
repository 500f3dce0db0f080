"""Writing directions into ``.grad``."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gradbal._utils.dtensor import local, placed_like
from gradbal.jacobian.blocks import place_of
from gradbal.solvers.gram import added


def add_to_grads(
    params: Sequence[Tensor],
    held: Sequence[Tensor],
    grads: dict[int, Tensor],
    new: Collection[int] = (),
) -> None:
    """Add gradients to ``.grad``, as ``loss.backward()`` would: in the strides of the parameter.

    A parameter without ``.grad`` gets a new tensor, so that nobody who still holds an earlier
    gradient sees it change.

    Args:
        params: All parameters.
        held: What this process holds of each.
        grads: What to add, by number of the parameter; emptied, so that memory is freed on the way.
        new: Numbers of the gradients that were made for this call: nobody else can hold them, so
            they become ``.grad`` without a copy.
    """
    into: list[Tensor] = []
    dense: list[Tensor] = []
    for number in list(grads):
        param, part, grad = params[number], held[number], grads.pop(number)
        old = param.grad if part is param or param.grad is None else local(param.grad)
        if grad.is_sparse or (old is not None and old.is_sparse):
            param.grad = grad.clone() if old is None else added(old, grad)
        elif old is not None:
            into.append(old)
            dense.append(grad)
        else:
            if number not in new or place_of(grad) != place_of(part):
                grad = torch.empty_like(part, requires_grad=False).copy_(grad)
            param.grad = grad if part is param else placed_like(grad, param)
    if into:
        torch._foreach_add_(into, dense)


@contextmanager
def replacing_grads(params: Sequence[Tensor], fresh: bool) -> Iterator[None]:
    """With ``fresh``, clear all gradients first, and again if what follows fails.

    Their memory is free for the new ones, as after ``zero_grad``.
    """
    if not fresh:
        yield
        return
    _clear(params)
    try:
        yield
    except BaseException:
        _clear(params)
        raise


def _clear(params: Sequence[Tensor]) -> None:
    for param in params:
        param.grad = None


def fill(params: Sequence[Tensor], value: float | None) -> None:
    """Set every gradient to None, or fill it: with infinity a ``GradScaler`` skips the step."""
    for param in params:
        if param.requires_grad:
            param.grad = None if value is None else torch.full_like(param, value)
