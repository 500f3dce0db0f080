"""What enters a model: one batch or one per task, and named inputs for the modules that take them.

A module is handed those named inputs that its ``forward`` names. One that cannot name them there
says so by an attribute ``takes``, a collection of names, or None for all.
"""

import inspect
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs: TypeAlias = Any  # a tensor, any other batch, or a mapping of tasks to batches


class PerTask(dict[str, Any]):
    """One input for each task: ``model(PerTask(depth=x1, normal=x2))``.

    A plain mapping whose keys are all tasks is read the same way.

    Example:
        >>> sorted(PerTask.named(nli={"ids": 1, "mask": 2}, sst={"ids": 3, "mask": 4}))
        ['ids', 'mask']
    """

    @classmethod
    def named(cls, **batches: Mapping[str, Any]) -> "dict[str, PerTask]":
        """Return named inputs from one batch of named inputs per task: ``model(**...)``.

        Raises:
            ValueError: If the batches have different names.
        """
        names = {frozenset(batch) for batch in batches.values()}
        if len(names) > 1:
            came = ", ".join(f"{sorted(batch)} of {task!r}" for task, batch in batches.items())
            raise ValueError(f"PerTask: batches must have the same names, got {came}.")
        keys = next(iter(batches.values()), {})
        return {key: cls({task: batch[key] for task, batch in batches.items()}) for key in keys}


class OneBatch(dict[str, Any]):
    """One batch whose keys happen to be tasks: ``model(OneBatch(click=history, user=ids))``.

    Modules get it as a plain dict.
    """


for _kind in (PerTask, OneBatch):
    pytree.register_pytree_node(
        _kind,
        lambda mapping: (list(mapping.values()), list(mapping)),
        lambda values, keys, kind=_kind: kind(zip(keys, values, strict=True)),  # type: ignore[misc]
        serialized_type_name=f"arch_zoo.{_kind.__name__}",
        flatten_with_keys_fn=lambda mapping: (
            [(pytree.MappingKey(key), value) for key, value in mapping.items()],
            list(mapping),
        ),
    )


def is_per_task(owner: str, argument: str, item: Any, tasks: tuple[str, ...]) -> bool:
    """Return whether an input is one per task.

    Raises:
        ValueError: If some keys of a mapping are tasks and others are not.
    """
    if isinstance(item, PerTask):
        return True
    if isinstance(item, OneBatch) or not isinstance(item, Mapping):
        return False
    known = [key for key in item if key in tasks]
    if known and len(known) < len(item):
        other = next(key for key in item if key not in tasks)
        raise ValueError(
            f"{owner}: the keys of `{argument}` must all be tasks, or none of them, got "
            f"{known[0]!r}, a task, and {other!r}, which is none. Wrap it in `PerTask` or in "
            "`OneBatch`."
        )
    return len(known) == len(item)


def same(one: Any, other: Any) -> bool:
    """Return whether two inputs are made of the same objects."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor) or type(one) is not type(other):
        return False
    (left, spec), (right, spec2) = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return spec == spec2 and all(a is b for a, b in zip(left, right, strict=True))


def takes(module: nn.Module, first: bool = True) -> frozenset[str] | None:
    """Return the names of inputs that a module takes, or None if it takes any name.

    Args:
        module: Any module.
        first: Count the first argument of its ``forward``, which is that of `x` if there is one.
    """
    if hasattr(module, "takes"):
        said: Collection[str] | None = module.takes  # type: ignore[assignment]
        return None if said is None else frozenset(said)
    # the function and not the bound method, which compilers see through
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    names = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return frozenset(names if first else names[1:])


def joint(modules: Iterable[nn.Module]) -> frozenset[str] | None:
    """Return the names that any of some modules takes, or None if one of them takes any name."""
    found: frozenset[str] = frozenset()
    for module in modules:
        names = takes(module)
        if names is None:
            return None
        found |= names
    return found


def call(module: nn.Module, x: Any, named: Mapping[str, Any]) -> Any:
    """Call a module on `x`, unless that is None, and on the named inputs that it takes."""
    if not named:
        return module(x)
    taken = taken_by(module, named, first=x is None)
    return module(**taken) if x is None else module(x, **taken)


def taken_by(module: nn.Module, named: Mapping[str, Any], first: bool = False) -> dict[str, Any]:
    """Return those of the named inputs that a module takes, as in :func:`takes`."""
    names = takes(module, first) if named else None
    return {name: item for name, item in named.items() if names is None or name in names}


def check_taken(
    owner: str, named: Iterable[str], modules: Iterable[nn.Module], known: Collection[str] = ()
) -> None:
    """Make sure that no named input is lost.

    Raises:
        TypeError: If neither a module nor `known` names it.
    """
    names = joint(modules)
    for name in named:
        if names is not None and name not in names and name not in known:
            raise TypeError(
                f"{owner}: `{name}` is named by the `forward` of no stage and of no head. Pass "
                "stages as a list, each with the names it takes, because a Sequential hands on "
                "one value only."
            )
