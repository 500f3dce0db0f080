"""Writing directions into ``.grad``."""

from collections.abc import Mapping, Sequence
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor

from gradbal.blocks import place_of
from gradbal.gram import added
from gradbal.sharded import local, placed_like

HOLDERS = 3  # of a gradient in the loop below: the mapping, a variable, the question itself


class Writer:
    """Write into ``.grad`` as ``loss.backward()`` would: add, in the strides of the parameter.

    Storage for gradients is kept from step to step and used whenever a parameter has no ``.grad``,
    unless the gradient is nobody else's; then it becomes ``.grad`` itself, as in torch.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def add(
        self,
        params: Sequence[Tensor],
        held: Sequence[Tensor],
        grads: Mapping[int, Tensor],
        lent: Mapping[int, Tensor],
    ) -> None:
        """Add gradients to ``.grad``.

        Args:
            params: All parameters.
            held: What this process holds of each.
            grads: What to add, by number of the parameter.
            lent: Storage that belongs to somebody else, by number; a gradient that already lies
                there is attached as it is.
        """
        into: list[Tensor] = []
        dense: list[Tensor] = []
        fresh: list[Tensor] = []
        copies: list[Tensor] = []
        taken: set[int] = set()
        for number in grads:
            param, grad = params[number], grads[number]
            part = held[number]
            old = param.grad if part is param or param.grad is None else local(param.grad)
            if grad.is_sparse or (old is not None and old.is_sparse):
                param.grad = grad.clone() if old is None else added(old, grad)
            elif old is not None:
                into.append(old)
                dense.append(grad)
            else:
                place = lent.get(number)
                if place is None and getrefcount(grad) == HOLDERS and _fits(grad, part, taken):
                    param.grad = grad if part is param else placed_like(grad, param)
                    continue
                if place is None:
                    place = self._buffer(number, part)
                if place is not grad:
                    fresh.append(place)
                    copies.append(grad)
                own = place.detach()  # scripts that replace `.grad.data` must not reach us
                param.grad = own if part is param else placed_like(own, param)
        if fresh:
            torch._foreach_copy_(fresh, copies)
        if into:
            torch._foreach_add_(into, dense)

    def _buffer(self, number: int, param: Tensor) -> Tensor:
        buffer = self.buffers.get(number)
        if buffer is None or place_of(buffer) != place_of(param):
            buffer = self.buffers[number] = torch.empty_like(param, requires_grad=False)
        return buffer


def _fits(grad: Any, param: Tensor, taken: set[int]) -> bool:  # torch's stub lacks _use_count
    """Say whether a gradient that nobody else holds can become ``.grad`` as it is.

    Args:
        grad: The gradient.
        param: The parameter.
        taken: Storages that have been used so; this one joins them.
    """
    storage = grad.untyped_storage()
    alone = storage._cdata not in taken and storage.nbytes() == grad.nbytes
    if not alone or grad._use_count() > 1 or place_of(grad) != place_of(param):
        return False
    taken.add(storage._cdata)
    return True
