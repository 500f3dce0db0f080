"""A level of shared and private experts, with the gates that mix them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arch_zoo.experts import ExpertBank
from arch_zoo.tensors import mix


class LevelOutput(NamedTuple):
    """Streams of the tasks, the shared stream, outputs of shared experts, auxiliary losses."""

    streams: dict[str, Tensor]
    shared: Tensor | None
    experts: tuple[Tensor, ...]
    aux: dict[str, Tensor]


class Level(nn.Module):
    """Experts of all tasks and of each, and gates that mix them; a task's own experts come first.

    Args:
        shared: Experts that every task mixes, if any.
        specific: Experts of single tasks, for those that have some.
        tasks: All tasks.
        gate: Makes a gate over so many experts: a module from what gates read to a pair of weights
            ``[batch, n]`` and an auxiliary loss or None.
        keep_stream: Also mix all experts into a shared stream for the next level.
    """

    def __init__(
        self,
        shared: ExpertBank | None,
        specific: Mapping[str, ExpertBank],
        tasks: Sequence[str],
        gate: Callable[[int], nn.Module],
        keep_stream: bool,
    ) -> None:
        super().__init__()
        n_shared = 0 if shared is None else shared.n
        sizes = {name: specific[name].n if name in specific else 0 for name in tasks}
        self.shared = shared
        self.specific = nn.ModuleDict(specific)
        self.gates = nn.ModuleDict({name: gate(n + n_shared) for name, n in sizes.items()})
        self.shared_gate = gate(sum(sizes.values()) + n_shared) if keep_stream else None

    def forward(
        self,
        streams: Mapping[str, Tensor],
        shared: Tensor | None,
        tasks: Sequence[str],
        read: Callable[[Tensor], Tensor],
    ) -> LevelOutput:
        """Run the experts of all given streams and the gates of some tasks.

        Args:
            streams: Inputs of the tasks whose experts run.
            shared: Input of the shared experts; without, they read each task's stream.
            tasks: Those whose streams go on.
            read: What gates see of a stream.
        """
        own = {
            name: (self.specific[name](x),) for name, x in streams.items() if name in self.specific
        }
        common = () if shared is None else self._common(shared)
        mixed: dict[str, Tensor] = {}
        aux: dict[str, Tensor] = {}
        for name in tasks:
            banks = own.get(name, ()) + (self._common(streams[name]) if shared is None else common)
            weights, penalty = self.gates[name](read(streams[name]))
            mixed[name] = _blend(weights, banks)
            if penalty is not None:
                aux[name] = penalty
        following = None
        if self.shared_gate is not None and shared is not None:
            weights, _ = self.shared_gate(read(shared))
            following = _blend(weights, (*(bank for (bank,) in own.values()), *common))
        return LevelOutput(mixed, following, common, aux)

    def _common(self, x: Tensor) -> tuple[Tensor, ...]:
        return () if self.shared is None else (self.shared(x),)


def _blend(weights: Tensor, banks: Sequence[Tensor]) -> Tensor:
    """Mix banks ``[batch, n_i, ...]`` with weights ``[batch, sum of n_i]``."""
    shares = torch.split(weights, [bank.shape[1] for bank in banks], dim=1)
    parts = [mix("be", share, bank) for share, bank in zip(shares, banks, strict=True)]
    return sum(parts[1:], start=parts[0])
