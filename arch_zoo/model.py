"""The contract of all architectures: encode, decode, and which parameter serves which tasks."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from arch_zoo.decoders import Decoded, Decoder, Result
from arch_zoo.inputs import Inputs, OneBatch, call, check_taken, is_per_task, same, taken_by

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

Heads: TypeAlias = Mapping[str, nn.Module] | Decoder
Reach: TypeAlias = Iterator[tuple[nn.Module | nn.Parameter, Collection[str]]]


class Features(NamedTuple):
    """What an encoder hands to the heads.

    Args:
        shared: The cut where the gradients of the tasks meet, none of its tensors upstream of
            another; empty where the architecture has no such cut. With one batch per task, the
            tensors of all batches one after the other.
        per_task: What the head of each task reads, a tensor or a structure of tensors; with a
            :class:`Decoder` the streams of the task's batch, by name.
        aux: Auxiliary losses by name, each without dimensions; they are no tasks.
        named: By task the named inputs of its batch, for heads that take some.
    """

    shared: tuple[Tensor, ...]
    per_task: dict[str, Any]
    aux: dict[str, Tensor]
    named: Mapping[str, Mapping[str, Any]] = {}


class MultiTaskModel(nn.Module, ABC):
    """A model with one head per task, and the base of every architecture.

    An architecture implements :meth:`encode`, which most delegate to :meth:`by_batch`, and
    :meth:`reach`. A forward pass leaves nothing on the model but the statistics of norm layers.

    ``model(x)`` is one batch for all tasks: a tensor, a dict of features, a graph, whatever the
    encoder reads. ``model({"depth": x1, "normal": x2})`` and ``model(PerTask(...))`` are one batch
    per task. Named inputs, ``model(x, attention_mask=m)`` or ``model(**tokens)``, go to every
    stage, gate and head whose ``forward`` names them. Reserved names are `x`, `tasks`,
    `return_aux` and `full`.

    Args:
        heads: One module per task, which reads what the architecture hands to this task; or a
            :class:`Decoder`, whose heads read the features of other tasks, too.

    Raises:
        ValueError: If there is no task, or one whose name cannot name a submodule.
    """

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads: nn.ModuleDict | Decoder
        if isinstance(heads, Decoder):
            self.heads = heads
            return
        names = list(heads.keys())
        if not names:
            raise ValueError(f"{self._owner}: `heads` must name at least one task, got none.")
        taken = nn.ModuleDict()
        for name in names:
            if not isinstance(name, str) or not name or "." in name or hasattr(taken, name):
                raise ValueError(
                    f"{self._owner}: `heads` must be named by non-empty strings without dots that "
                    f"are no attribute of ModuleDict, got {name!r}. Rename the task."
                )
        self.heads = nn.ModuleDict({name: heads[name] for name in names})

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of the heads."""
        return self.heads.tasks if isinstance(self.heads, Decoder) else tuple(self.heads.keys())

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of what the encoder computes: the tasks, unless a decoder asks for others."""
        return self.heads.streams if isinstance(self.heads, Decoder) else tuple(self.heads.keys())

    @abstractmethod
    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        """Compute what the heads read.

        Args:
            x: One batch for all tasks, or a mapping of tasks to batches, of any sizes; may be left
                out where the first stage takes named inputs only.
            tasks: The tasks to compute; by default those of the mapping, or all.
            named: Further inputs by name, given like `x`.

        Returns:
            Features of these tasks, without work that only others need.

        Raises:
            ValueError: If a task is unknown or has no batch.
            TypeError: If nothing takes a named input.
        """

    @abstractmethod
    def reach(self) -> Reach:
        """Yield parts of the encoder with the streams through whose heads a loss reaches them.

        These are the tasks where each head reads its own stream. It holds in training mode.
        """

    def receivers(self) -> Iterator[nn.Module]:
        """Yield the modules of the encoder that are handed the named inputs they take."""
        return iter(())

    def decode(self, feats: Features, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """Apply the heads.

        Args:
            feats: What :meth:`encode` returned.
            tasks: Those to decode; by default all that were encoded.

        Returns:
            Outputs by task.

        Raises:
            ValueError: If a task was not encoded.
        """
        return self._decode(feats, tasks).outputs

    def forward(
        self,
        x: Inputs = None,
        tasks: Sequence[str] | None = None,
        *,
        return_aux: bool = False,
        full: bool = False,
        **named: Inputs,
    ) -> Any:
        """Encode and decode.

        Args:
            x: As in :meth:`encode`.
            tasks: As in :meth:`encode`.
            return_aux: Also return the auxiliary losses.
            full: Return all of :class:`Result`.
            named: As in :meth:`encode`.

        Returns:
            Outputs by task; with ``return_aux`` a pair of them and the auxiliary losses by name.
        """
        feats = self.encode(x, tasks, **named)
        outputs, predictions, aux = self._decode(feats, None)
        aux = {**feats.aux, **aux}
        if full:
            return Result(outputs, aux, dict(predictions))
        return (outputs, aux) if return_aux else outputs

    def run(self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs) -> Result:
        """Return outputs, auxiliary losses and auxiliary predictions, as ``model(x, full=True)``.

        See :func:`arch_zoo.task_losses` for the losses of a result.
        """
        result: Result = self(x, tasks, full=True, **named)
        return result

    def parameter_task_sets(self) -> dict[str, frozenset[str]]:
        """Return by parameter name the tasks whose losses have a path to it in training mode.

        A parameter that its own module never uses, or that is frozen, counts as used. The sets
        hold for losses of one output each, and of the auxiliary predictions of one task.
        """
        sets: dict[int, set[str]] = {}
        readers = self._readers()
        encoder = (
            (part, {task for stream in streams for task in readers[stream]})
            for part, streams in self.reach()
        )
        for part, tasks in (*self._head_reach(), *encoder):
            for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
                sets.setdefault(id(parameter), set()).update(tasks)
        return {
            name: frozenset(sets.get(id(parameter), ()))
            for name, parameter in self.named_parameters()
        }

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that two tasks or more reach, but for frozen ones."""
        return self._where(lambda tasks: len(tasks) > 1)

    def task_parameters(self, task: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that this task alone reaches, but for frozen ones.

        Raises:
            ValueError: If the task is unknown.
        """
        self._among(self.tasks, "task", [task])
        return self._where(lambda tasks: tasks == {task})

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        """Yield those that shape the sharing, such as stitches or the choices of branches."""
        return iter(())

    def initialize(self, example: Inputs = None, **named: Inputs) -> "Self":
        """Size what is sized by the first input, changing nothing that has a size.

        Args:
            example: Inputs of the usual kind; a batch of one will do.
            named: Further inputs of :meth:`encode`, by name.

        Returns:
            The model itself.
        """
        modes = [(module, module.training) for module in self.modules()]
        try:
            with torch.no_grad():
                self.eval()(example, **named)
        finally:
            for module, mode in modes:
                module.training = mode
        return self

    def by_batch(
        self,
        encode: Callable[..., Features],
        tasks: Sequence[str] | None,
        x: Inputs,
        named: Mapping[str, Inputs] | None = None,
        /,
        **more: Inputs,
    ) -> Features:
        """Call ``encode(streams, x=..., **named)`` once per distinct batch and join the features.

        Tasks that are given the same objects share one call.

        Args:
            encode: Returns the features of some streams, one of which may be None for `x`.
            tasks: As in :meth:`encode`.
            x: As in :meth:`encode`.
            named: Further inputs, which some receiver or head has to take.
            more: Further inputs that the architecture itself takes, also passed on by name.
        """
        named = named or {}
        inputs = {"x": x, **named, **more}
        if named:
            check_taken(self._owner, named, (*self.receivers(), *self._head_modules()))
        names = self._asked(tasks, inputs)
        groups: list[tuple[list[str], dict[str, Any]]] = []
        for name in names:
            batch = {key: self._batch(key, item, name) for key, item in inputs.items()}
            for members, known in groups:
                if all(same(batch[key], known[key]) for key in inputs):
                    members.append(name)
                    break
            else:
                groups.append(([name], batch))
        shared: tuple[Tensor, ...] = ()
        per_task, aux, given = {}, {}, {}
        for members, batch in groups:
            part = encode(self._streams_of(members), **batch)
            shared += part.shared
            aux.update(part.aux)
            own = {key: batch[key] for key in named}
            for name in members:
                joint = isinstance(self.heads, Decoder)
                per_task[name] = part.per_task if joint else part.per_task[name]
                given[name] = own
        return Features(shared, {name: per_task[name] for name in names}, aux, given)

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _decode(self, feats: Features, tasks: Sequence[str] | None) -> Decoded:
        names = self._among(tuple(feats.per_task), "tasks", tasks)
        if not isinstance(self.heads, Decoder):
            return Decoded(
                {
                    name: call(self.heads[name], feats.per_task[name], feats.named.get(name, {}))
                    for name in names
                }
            )
        outputs: dict[str, Any] = {}
        predictions: dict[str, Any] = {}
        aux: dict[str, Tensor] = {}
        while names:
            streams = feats.per_task[names[0]]
            members = [name for name in names if feats.per_task[name] is streams]
            names = tuple(name for name in names if name not in members)
            taken = taken_by(self.heads, feats.named.get(members[0], {}))
            part = self.heads(streams, members, **taken)
            mine = {k: y for k, y in part.outputs.items() if k in members or k not in self.tasks}
            outputs.update(mine)
            predictions.update(part.predictions)
            aux.update(part.aux)
        ours = {name: outputs.pop(name) for name in self.tasks if name in outputs}
        ordered = {name: ours[name] for name in feats.per_task if name in ours}
        return Decoded({**ordered, **outputs}, predictions, aux)

    def _readers(self) -> dict[str, set[str]]:
        """Return by stream the tasks that send a gradient into it."""
        readers: dict[str, set[str]] = {stream: set() for stream in self.streams}
        for task in self.tasks:
            read = self.heads.gradients(task) if isinstance(self.heads, Decoder) else (task,)
            for stream in read:
                readers[stream].add(task)
        return readers

    def _streams_of(self, tasks: Sequence[str]) -> tuple[str, ...]:
        """Return the streams that some tasks read, in order."""
        if not isinstance(self.heads, Decoder):
            return tuple(tasks)
        read = {stream for task in tasks for stream in self.heads.sources(task)}
        return tuple(stream for stream in self.streams if stream in read)

    def _head_reach(self) -> Reach:
        if isinstance(self.heads, Decoder):
            yield from self.heads.reach()
        else:
            yield from ((head, (name,)) for name, head in self.heads.items())

    def _all_but(self, module: nn.Module, private: Iterable[nn.Module]) -> Reach:
        """Yield the parameters of a module that lie in no private part, which all streams reach."""
        theirs = {id(parameter) for part in private for parameter in part.parameters()}
        for parameter in module.parameters():
            if id(parameter) not in theirs:
                yield parameter, self.streams

    def _copied_heads(self) -> Heads:
        """Return a copy of the heads, as the constructor takes them."""
        heads = deepcopy(self.heads)
        return heads if isinstance(heads, Decoder) else dict(heads.items())

    def _head_modules(self) -> Iterable[nn.Module]:
        return (self.heads,) if isinstance(self.heads, Decoder) else self.heads.children()

    def _asked(self, tasks: Sequence[str] | None, inputs: Mapping[str, Inputs]) -> tuple[str, ...]:
        """Return the tasks to compute: by default those of the first input by task, or all."""
        held = self.tasks
        for argument, item in inputs.items():
            by_task = is_per_task(self._owner, argument, item, self.tasks)
            if by_task and (argument == "x" or inputs["x"] is None):
                held = self._among(self.tasks, argument, tuple(item))
                break
        return self._among(self.tasks, "tasks", held if tasks is None else tasks)

    def _batch(self, argument: str, item: Inputs, task: str) -> Any:
        """Return what an input holds for a task."""
        if not is_per_task(self._owner, argument, item, self.tasks):
            return dict(item) if isinstance(item, OneBatch) else item
        if task not in item:
            raise ValueError(
                f"{self._owner}: `{argument}` must hold a batch for every task of `tasks`, "
                f"got none for {task!r}."
            )
        return item[task]

    def _among(
        self, known: tuple[str, ...], argument: str, names: Iterable[str] | None
    ) -> tuple[str, ...]:
        """Return the names, each once and by default all known ones; raise on another."""
        chosen = known if names is None else tuple(dict.fromkeys(names))
        for name in chosen:
            if name not in known:
                listed = ", ".join(repr(task) for task in known)
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{self._owner}: `{argument}` must be among {listed}, got {name!r}.{hint}"
                )
        return chosen

    def _where(self, holds: Callable[[frozenset[str]], bool]) -> Iterator[nn.Parameter]:
        sets = self.parameter_task_sets()
        return (
            parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and holds(sets[name])
        )
