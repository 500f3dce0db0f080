"""The contract of all architectures: encode, decode, and which parameter serves which tasks."""

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
Reach: TypeAlias = Iterator[tuple[nn.Module | nn.Parameter, Collection[str]]]


class Features(NamedTuple):
    """What an encoder hands to the heads.

    Args:
        shared: The cut where the gradients of the tasks meet, none of its tensors upstream of
            another; empty where the architecture has no such cut. With one batch per task, the
            tensors of all batches one after the other.
        per_task: What each head reads.
        aux: Auxiliary losses by name, each without dimensions; they are no tasks.
    """

    shared: tuple[Tensor, ...]
    per_task: dict[str, Tensor]
    aux: dict[str, Tensor]


class MultiTaskModel(nn.Module, ABC):
    """A model with one head per task, and the base of every architecture.

    An architecture implements :meth:`encode`, which most delegate to :meth:`by_batch`, and
    :meth:`reach`. A forward pass leaves nothing on the model but the statistics of norm layers.

    Args:
        heads: One module per task; it reads what the architecture hands to this task.

    Raises:
        ValueError: If there is no task, or one whose name cannot name a submodule.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
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
        return tuple(self.heads.keys())

    @abstractmethod
    def encode(self, x: Inputs, tasks: Sequence[str] | None = None) -> Features:
        """Compute what the heads read.

        Args:
            x: One batch for all tasks, or a mapping of tasks to batches, of any sizes.
            tasks: The tasks to compute; by default those of the mapping, or all.

        Returns:
            Features of these tasks, without work that only others need.

        Raises:
            ValueError: If a task is unknown or has no batch.
        """

    @abstractmethod
    def reach(self) -> Reach:
        """Yield parts of the encoder with the tasks whose losses they reach in training mode."""

    def decode(self, feats: Features, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Apply the heads.

        Args:
            feats: What :meth:`encode` returned.
            tasks: Those to decode; by default all that were encoded.

        Returns:
            Outputs by task.

        Raises:
            ValueError: If a task was not encoded.
        """
        names = self._among(tuple(feats.per_task), "tasks", tasks)
        return {name: self.heads[name](feats.per_task[name]) for name in names}

    def forward(
        self,
        x: Inputs,
        tasks: Sequence[str] | None = None,
        *,
        return_aux: bool = False,
        **given: Any,  # further inputs that an architecture's `encode` names
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Encode and decode.

        Args:
            x: As in :meth:`encode`.
            tasks: As in :meth:`encode`.
            return_aux: Also return the auxiliary losses.
            given: Further inputs of :meth:`encode`, by name.

        Returns:
            Outputs by task; with ``return_aux`` a pair of them and the auxiliary losses by name.
        """
        feats = self.encode(x, tasks, **given)
        outputs = self.decode(feats)
        return (outputs, feats.aux) if return_aux else outputs

    def parameter_task_sets(self) -> dict[str, frozenset[str]]:
        """Return by parameter name the tasks whose losses have a path to it in training mode.

        A parameter that its own module never uses, or that is frozen, counts as used.
        """
        sets: dict[int, set[str]] = {}
        heads = ((head, (name,)) for name, head in self.heads.items())
        for part, tasks in (*heads, *self.reach()):
            for parameter in part.parameters() if isinstance(part, nn.Module) else (part,):
                sets.setdefault(id(parameter), set()).update(tasks)
        return {
            name: frozenset(sets.get(id(parameter), ()))
            for name, parameter in self.named_parameters()
        }

    def shared_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that two tasks or more reach."""
        return self._where(lambda tasks: len(tasks) > 1)

    def task_parameters(self, task: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that this task alone reaches.

        Raises:
            ValueError: If the task is unknown.
        """
        self._among(self.tasks, "task", [task])
        return self._where(lambda tasks: tasks == {task})

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        """Yield those that shape the sharing, such as stitches or the choices of branches."""
        return iter(())

    def initialize(self, example: Inputs, **given: Any) -> "Self":  # as in `forward`
        """Size what is sized by the first input, changing nothing that has a size.

        Args:
            example: Inputs of the usual kind; a batch of one will do.
            given: Further inputs of :meth:`encode`, by name.

        Returns:
            The model itself.
        """
        modes = [(module, module.training) for module in self.modules()]
        try:
            with torch.no_grad():
                self.eval()(example, **given)
        finally:
            for module, mode in modes:
                module.training = mode
        return self

    def by_batch(
        self,
        encode: Callable[..., Features],
        tasks: Sequence[str] | None,
        x: Inputs,
        **more: Inputs | None,
    ) -> Features:
        """Call ``encode(tasks, x, ...)`` once per distinct batch and join the features.

        Tasks that are given the same tensor objects share one call. Inputs beside `x` are passed on
        by name.
        """
        held = self._among(self.tasks, "x", tuple(x)) if isinstance(x, Mapping) else self.tasks
        names = self._among(self.tasks, "tasks", held if tasks is None else tasks)
        inputs = {"x": x, **more}
        groups: list[tuple[list[str], dict[str, Tensor | None]]] = []
        for name in names:
            batch = {key: self._batch(key, item, name) for key, item in inputs.items()}
            for members, known in groups:
                if all(batch[key] is known[key] for key in inputs):
                    members.append(name)
                    break
            else:
                groups.append(([name], batch))
        parts = [encode(tuple(members), **batch) for members, batch in groups]
        per_task = {name: z for part in parts for name, z in part.per_task.items()}
        return Features(
            shared=tuple(z for part in parts for z in part.shared),
            per_task={name: per_task[name] for name in names},
            aux={name: loss for part in parts for name, loss in part.aux.items()},
        )

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _batch(self, argument: str, item: Inputs | None, task: str) -> Tensor | None:
        """Return what an input holds for a task."""
        if not isinstance(item, Mapping):
            return item
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
        return (parameter for name, parameter in self.named_parameters() if holds(sets[name]))
