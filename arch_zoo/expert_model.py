"""Models of levels of experts: what MMoE, DSelect-k, CGC and PLE have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn

from arch_zoo.encoders import Encoder, Factory, module_of
from arch_zoo.experts import ExpertBank
from arch_zoo.gates import Gate
from arch_zoo.level import Level
from arch_zoo.model import Features, Inputs, MultiTaskModel, Reach

Expert: TypeAlias = Factory | Sequence[nn.Module] | ExpertBank


class ExpertModel(MultiTaskModel):
    """A chain of levels of experts, on raw input or on a shared stem.

    Args:
        heads: One module per task.
        experts: What makes the experts of each level.
        num_shared: Shared experts per level.
        num_specific: Experts per task and level, one number or one for each task.
        gate: What gates read.
        make_gate: Makes a gate over so many experts.
        stem: A shared encoder below the first level.
        shared_stream: Feed shared experts above the first level with a mix of all experts below;
            else they read each task's stream.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        experts: Sequence[Expert],
        *,
        num_shared: int,
        num_specific: int | Mapping[str, int],
        gate: Gate,
        make_gate: Callable[[int], nn.Module],
        stem: Encoder | None,
        shared_stream: bool = False,
    ) -> None:
        super().__init__(heads)
        sizes = self._sizes(num_shared, num_specific)
        for expert in experts if any(sizes.values()) else ():
            if isinstance(expert, nn.Module | Sequence):
                raise TypeError(
                    f"{self._owner}: experts must come from a factory, which makes those of each "
                    f"task anew, got {type(expert).__name__}."
                )
        self.gate = gate
        self.stem = None if stem is None else module_of(self._owner, "stem", stem)
        self.shared_stream = shared_stream and num_shared > 0 and len(experts) > 1
        self.levels = nn.ModuleList(
            Level(
                _bank(expert, num_shared) if num_shared else None,
                {name: _bank(expert, n) for name, n in sizes.items() if n},
                self.tasks,
                make_gate,
                keep_stream=self.shared_stream and depth < len(experts) - 1,
            )
            for depth, expert in enumerate(experts)
        )

    def encode(
        self, x: Inputs, tasks: Sequence[str] | None = None, *, gate_input: Inputs | None = None
    ) -> Features:
        """Compute what the heads read, as in :meth:`MultiTaskModel.encode`.

        Args:
            x: One batch for all tasks, or a mapping of tasks to batches.
            tasks: The tasks to compute.
            gate_input: What gates with ``Gate("given")`` read, ``[batch, width]``, given like `x`.

        Returns:
            Features of these tasks.

        Raises:
            ValueError: If a task is unknown, or ``gate_input`` missing or of no use.
        """
        return self.by_batch(self._encode, tasks, x, gate_input=gate_input)

    def reach(self) -> Reach:
        """Yield parts with their tasks, from the last level, whose streams serve one task each."""
        if self.stem is not None:
            yield self.stem, self.tasks
        streams: dict[str, set[str]] = {name: {name} for name in self.tasks}
        shared: set[str] = set()
        for level in reversed(list(self._levels())):
            for name in self.tasks:
                yield level.gates[name], streams[name]
            for name, bank in level.specific.items():
                yield bank, streams[name] | shared
            if level.shared_gate is not None:
                yield level.shared_gate, shared
            everyone = shared.union(*streams.values())
            if level.shared is not None:
                yield level.shared, everyone
            follows = self._gates_follow or (level.shared is not None and not self.shared_stream)
            streams = {
                name: tasks | shared if name in level.specific else tasks if follows else set()
                for name, tasks in streams.items()
            }
            shared = everyone if self.shared_stream else set()

    def _encode(self, tasks: tuple[str, ...], x: Tensor, gate_input: Tensor | None) -> Features:
        x = x if self.stem is None else self.stem(x)
        private = x if self.stem is None else x.view_as(x)  # so that the cut has no path to itself
        read = partial(self.gate.read, gate_input=gate_input)
        last = len(self.levels) - 1
        mixed = {name for level in self._levels() for name in level.specific}
        wider = [name for name in self.tasks if name in tasks or name in mixed]
        names = [wider if self.shared_stream and d < last else tasks for d in range(last + 2)]
        streams, shared, aux = dict.fromkeys(names[0], private), x, {}
        for level, following in zip(self.levels, names[1:], strict=True):
            streams, shared, experts, aux = level(streams, shared, following, read)
        cut = experts if last == 0 else ()
        if last == 0 and self.stem is not None and (self._gates_follow or level.specific):
            cut = (*cut, private)
        return Features(shared=cut, per_task=streams, aux=aux)

    @property
    def _gates_follow(self) -> bool:
        """Whether gradients of gates go into what they read."""
        return self.gate.input != "given" and not self.gate.detach_input

    def _levels(self) -> Iterable[Level]:
        return (level for level in self.levels if isinstance(level, Level))

    def _sizes(self, num_shared: int, num_specific: int | Mapping[str, int]) -> dict[str, int]:
        """Return the number of own experts by task, checked."""
        if isinstance(num_specific, Mapping):
            self._among(self.tasks, "num_specific", num_specific)
            sizes = {name: num_specific.get(name) for name in self.tasks}
        else:
            sizes = dict.fromkeys(self.tasks, num_specific)
        counts = {}
        for name, n in sizes.items():
            if n is None or n < 0 or n + num_shared < 1 or num_shared < 0:
                raise ValueError(
                    f"{self._owner}: `num_shared` and `num_specific` must be >= 0 and give every "
                    f"task an expert, got {num_shared} shared and {n} for {name!r}."
                )
            counts[name] = n
        return counts


def num_experts_of(owner: str, expert: Expert, num_experts: int | None) -> int:
    """Return the number of experts, which a bank or a list knows by itself.

    Raises:
        ValueError: If it is missing, below one, or not the number of those given.
    """
    held = expert.n if isinstance(expert, ExpertBank) else None
    held = len(expert) if isinstance(expert, Sequence | nn.ModuleList) else held
    n = held if num_experts is None else num_experts
    if n is None or n < 1 or held not in (None, n):
        must = ">= 1" if held is None else f"{held}, as many as there are, or left out"
        raise ValueError(f"{owner}: `num_experts` must be {must}, got {num_experts!r}.")
    return n


def _bank(expert: Expert, n: int) -> ExpertBank:
    return expert if isinstance(expert, ExpertBank) else ExpertBank(expert, n)
