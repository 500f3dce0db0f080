"""A level of shared and private experts, with the gates that mix them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from arch_zoo.experts import ExpertBank
from arch_zoo.tensors import blend


class LevelOutput(NamedTuple):
    """Streams of the tasks, the shared stream, outputs of shared experts, auxiliary losses."""

    streams: dict[str, Any]
    shared: Any
    experts: tuple[Any, ...]
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
        streams: Mapping[str, Any],
        shared: Any,
        tasks: Sequence[str],
        read: Callable[[Any], Tensor],
        named: Mapping[str, Any],
        separate: bool,
    ) -> LevelOutput:
        """Run the experts of all given streams and the gates of some tasks.

        Args:
            streams: Inputs of the tasks whose experts run.
            shared: Input of the shared experts.
            tasks: Those whose streams go on.
            read: What gates see of a stream.
            named: Inputs of the batch by name, for experts that take some.
            separate: Shared experts read each task's stream instead.
        """
        own = {
            name: (self.specific[name](x, **named),)
            for name, x in streams.items()
            if name in self.specific
        }
        common = () if separate else self._common(shared, named)
        mixed: dict[str, Any] = {}
        aux: dict[str, Tensor] = {}
        for name in tasks:
            theirs = self._common(streams[name], named) if separate else common
            banks = own.get(name, ()) + theirs
            weights, penalty = self.gates[name](read(streams[name]))
            mixed[name] = blend(weights, banks)
            if penalty is not None:
                aux[name] = penalty
        following = None
        if self.shared_gate is not None and not separate:
            weights, _ = self.shared_gate(read(shared))
            following = blend(weights, (*(bank for (bank,) in own.values()), *common))
        return LevelOutput(mixed, following, common, aux)

    def _common(self, x: Any, named: Mapping[str, Any]) -> tuple[Any, ...]:
        return () if self.shared is None else (self.shared(x, **named),)
