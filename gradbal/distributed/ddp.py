"""Whether somebody else averages gradients: DDP does, in the passes that it knows of."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from gradbal.distributed.fingerprint import digest

Differ = Callable[[Tensor], list[int]]


class Reduced:
    """Learn which gradients come averaged from an ordinary backward pass, by looking.

    A gradient that is not what the pass brought to this process, and is the same in all of them,
    has been averaged. One that differs between processes has not, and this is settled, too. As
    long as a gradient says neither (it is zero, or the processes have the same samples), it is
    averaged, which then changes nothing, and looked at again.

    Args:
        differ: Gives the positions at which the processes' numbers differ.
    """

    def __init__(self, differ: Differ) -> None:
        self.differ = differ
        self.settled: dict[int, bool] = {}
        self.params: Mapping[int, Tensor] = {}

    @contextmanager
    def watch(self, params: Mapping[int, Tensor]) -> Iterator[None]:
        """Look at these parameters during a pass.

        Args:
            params: Those that all processes hold, by number.
        """
        self.params = params
        asked = {n: p for n, p in params.items() if n not in self.settled and p.requires_grad}
        fresh = [n for n, param in asked.items() if param.grad is None]
        brought: dict[int, Tensor] = {}

        def keep(number: int) -> Callable[[Tensor], None]:
            return lambda grad: brought.__setitem__(number, grad.clone())

        hooks = [params[n].register_hook(keep(n)) for n in fresh]  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if asked:
            self._settle(fresh, sorted(asked), brought)

    def missing(self) -> list[int]:
        """Return the parameters whose gradients are yet to be averaged."""
        return [n for n in self.params if not self.settled.get(n, False)]

    def _settle(self, fresh: list[int], asked: list[int], brought: Mapping[int, Tensor]) -> None:
        """Draw the same conclusions in all processes."""
        grads = {n: self.params[n].grad for n in asked}
        changed = [n in brought and digest(grads[n]) != digest(brought[n]) for n in asked]
        numbers = [digest(grads[n]) for n in asked]
        differing = self.differ(torch.tensor(numbers))
        elsewhere = self.differ(torch.tensor(changed, dtype=torch.int64))
        for i, number in enumerate(asked):
            if i in differing:
                self.settled[number] = False
            elif changed[i] or i in elsewhere:
                self.settled[number] = True
