"""Models of levels of experts: what MMoE, DSelect-k, CGC and PLE have in common."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn

from arch_zoo.encoders import Encoder, Factory, module_of
from arch_zoo.experts import ExpertBank
from arch_zoo.gates import Gate
from arch_zoo.inputs import Inputs, call
from arch_zoo.layout import width_of
from arch_zoo.level import Level
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.tensors import leaves_of, views_of

Expert: TypeAlias = Factory | Sequence[nn.Module] | ExpertBank
Experts: TypeAlias = Expert | Mapping[str, Factory]
Counts: TypeAlias = int | Mapping[str, int]


class ExpertModel(MultiTaskModel):
    """A chain of levels of experts, on raw input or on a shared stem.

    Args:
        heads: One module per task.
        experts: What makes the experts of each level; a mapping has a factory for each task and one
            for ``"shared"``.
        num_shared: Shared experts per level, one number or one for each level.
        num_specific: Experts per task and level, one number or one for each task, or a list of
            these by level.
        gate: What gates read.
        make_gate: Makes a gate over so many experts.
        stem: A shared encoder below the first level.
        shared_stream: Feed shared experts above the first level with a mix of all experts below;
            else they read each task's stream.
    """

    def __init__(
        self,
        heads: Heads,
        experts: Sequence[Experts],
        *,
        num_shared: int | Sequence[int],
        num_specific: Counts | Sequence[Counts],
        gate: Gate,
        make_gate: Callable[[int], nn.Module],
        stem: Encoder | None,
        shared_stream: bool = False,
    ) -> None:
        super().__init__(heads)
        shared = self._by_level("num_shared", num_shared, len(experts))
        specific = self._by_level("num_specific", num_specific, len(experts))
        sizes = [self._sizes(n, counts) for n, counts in zip(shared, specific, strict=True)]
        self.gate = gate
        self.stem = None if stem is None else module_of(self._owner, "stem", stem)
        self.shared_stream = shared_stream and any(shared[1:])
        self.levels = nn.ModuleList(
            Level(
                self._bank(expert, "shared", n) if n else None,
                {name: self._bank(expert, name, m) for name, m in own.items() if m},
                self.streams,
                make_gate,
                keep_stream=self.shared_stream and any(shared[depth + 1 :]),
            )
            for depth, (expert, n, own) in enumerate(zip(experts, shared, sizes, strict=True))
        )
        below = [self.stem, *(_experts(level) for level in self._levels())]
        self.widths = [None if part is None else width_of(part) for part in below]
        if gate.start == "even" and any(
            isinstance(bank, ExpertBank) and bank.starts_equal for bank in self.modules()
        ):
            raise ValueError(
                f"{self._owner}: experts must not start equal under gates that start even, because "
                "they would stay equal. Let the gates start at random, or make other experts."
            )

    def encode(
        self,
        x: Inputs = None,
        tasks: Sequence[str] | None = None,
        *,
        gate_input: Inputs = None,
        **named: Inputs,
    ) -> Features:
        """Compute what the heads read, as in :meth:`MultiTaskModel.encode`.

        Args:
            x: One batch for all tasks, or a mapping of tasks to batches.
            tasks: The tasks to compute.
            gate_input: What gates with ``Gate("given")`` read, ``[batch, width]``, given like `x`.
            named: Further inputs by name, for a stem, experts or heads that take them; the gates'
                pooling heeds an ``attention_mask``.

        Returns:
            Features of these tasks.

        Raises:
            ValueError: If a task is unknown, or ``gate_input`` missing or of no use.
        """
        return self.by_batch(self._encode, tasks, x, named, gate_input=gate_input)

    def receivers(self) -> Iterator[nn.Module]:
        yield from [] if self.stem is None else [self.stem]
        for level in self._levels():
            yield from [] if level.shared is None else [level.shared]
            yield from level.specific.values()
        yield _Taker(self.gate.takes)

    def reach(self) -> Reach:
        """Yield parts with their tasks, from the last level, whose streams serve one task each."""
        if self.stem is not None:
            yield self.stem, self.streams
        streams: dict[str, set[str]] = {name: {name} for name in self.streams}
        shared: set[str] = set()
        for level in reversed(list(self._levels())):
            for name in self.streams:
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
            through_gate = shared if level.shared_gate is not None and self._gates_follow else set()
            shared = through_gate | (everyone if level.shared is not None else set())
            shared = shared if self.shared_stream else set()

    def _encode(
        self, tasks: tuple[str, ...], x: Inputs, gate_input: Tensor | None, **named: Inputs
    ) -> Features:
        x = x if self.stem is None else call(self.stem, x, named)
        private = x if self.stem is None else views_of(x)  # so that the cut has no path to itself
        read = partial(self.gate.read, gate_input=gate_input, named=named)
        last = len(self.levels) - 1
        streams, shared, aux = dict.fromkeys(self._needed(tasks, 0), private), x, {}
        for depth, level in enumerate(self.levels):
            following = self._needed(tasks, depth + 1)
            separate = depth > 0 and not self.shared_stream
            look = partial(read, width=self.widths[depth])
            streams, shared, experts, aux = level(streams, shared, following, look, named, separate)
        cut = [*experts] if last == 0 else []
        if last == 0 and self.stem is not None and (self._gates_follow or level.specific):
            cut.append(private)
        return Features(shared=leaves_of(cut), per_task=streams, aux=aux)

    @property
    def _gates_follow(self) -> bool:
        """Whether gradients of gates go into what they read."""
        return self.gate.input != "given" and not self.gate.detach_input

    def _levels(self) -> Iterable[Level]:
        return (level for level in self.levels if isinstance(level, Level))

    def _needed(self, asked: tuple[str, ...], depth: int) -> tuple[str, ...]:
        """Return the streams that enter a level: those asked for, and what shared streams mix."""
        mixed = {
            name
            for level in list(self._levels())[depth:]
            if level.shared_gate is not None
            for name in level.specific
        }
        return tuple(n for n in self.streams if n in asked or n in mixed) if mixed else asked

    def _by_level(self, argument: str, counts: Any, levels: int) -> list[Any]:
        """Return a count for each level."""
        if not isinstance(counts, Sequence):
            return [counts] * levels
        if len(counts) != levels:
            raise ValueError(
                f"{self._owner}: `{argument}` must be one for all levels or one for each of the "
                f"{levels}, got {len(counts)}."
            )
        return list(counts)

    def _bank(self, expert: Experts, name: str, n: int) -> ExpertBank:
        """Return the experts of a task, or the shared ones."""
        if isinstance(expert, Mapping):
            if name not in expert:
                raise ValueError(
                    f"{self._owner}: a level by name must have a factory for `shared` and for "
                    f"every task with experts, got none for {name!r}."
                )
            expert = expert[name]
        elif name != "shared" and isinstance(expert, nn.Module | Sequence):
            raise TypeError(
                f"{self._owner}: experts must come from a factory, which makes those of each "
                f"task anew, got {type(expert).__name__}."
            )
        return expert if isinstance(expert, ExpertBank) else ExpertBank(expert, n)

    def _sizes(self, num_shared: int, num_specific: Counts) -> dict[str, int]:
        """Return the number of own experts by task, checked."""
        if isinstance(num_specific, Mapping):
            self._among(self.streams, "num_specific", num_specific)
            sizes = {name: num_specific.get(name) for name in self.streams}
        else:
            sizes = dict.fromkeys(self.streams, num_specific)
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


def _experts(level: Level) -> nn.Module:
    """Return experts of a level, all of which have outputs alike."""
    return level.specific if level.shared is None else level.shared


class _Taker(nn.Module):
    """Stands for what is no module and takes named inputs.

    Args:
        takes: Their names.
    """

    def __init__(self, takes: Sequence[str]) -> None:
        super().__init__()
        self.takes = takes
