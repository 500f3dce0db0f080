"""Every argument check, in one wording: whose, which argument, what must hold, what came."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

OWNER = "MTLOptimizer"  # the class whose name begins most messages


def _owner(owner: object) -> str:
    return owner if isinstance(owner, str) else type(owner).__name__


def positive(owner: object, **values: float) -> None:
    """Raise ``ValueError`` unless every value is a number above zero."""
    of_type(owner, float, **values)
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{_owner(owner)}: `{name}` must be > 0, got {value!r}.")


def at_least(owner: object, low: float, **values: float) -> None:
    """Raise ``ValueError`` unless every value is a number not below ``low``."""
    of_type(owner, float, **values)
    for name, value in values.items():
        if not value >= low:
            raise ValueError(f"{_owner(owner)}: `{name}` must be >= {low}, got {value!r}.")


def between(owner: object, low: float, high: float, **values: float) -> None:
    """Raise ``ValueError`` unless every value lies in the closed interval."""
    of_type(owner, float, **values)
    for name, value in values.items():
        if not low <= value <= high:
            raise ValueError(
                f"{_owner(owner)}: `{name}` must be between {low} and {high}, got {value!r}."
            )


def of_type(owner: object, kind: type[int] | type[float], **values: object) -> None:
    """Raise ``TypeError`` unless every value is an int, or for float any real number."""
    for name, value in values.items():
        fits = isinstance(value, int if kind is int else (int, float))
        if not fits or isinstance(value, bool):
            expected = "an int" if kind is int else "a number"
            raise TypeError(f"{_owner(owner)}: `{name}` must be {expected}, got {value!r}.")


def one_of(owner: object, choices: Collection[Any], **values: object) -> None:
    """Raise ``ValueError`` unless every value is one of the choices."""
    for name, value in values.items():
        if value not in choices:
            listed = ", ".join(repr(choice) for choice in choices)
            raise ValueError(f"{_owner(owner)}: `{name}` must be one of {listed}, got {value!r}.")


def batches(owner: object, rule: object, allowed: Sequence[int], count: int, remedy: str) -> None:
    """Raise ``ValueError`` unless a rule can take losses from this many batches."""
    if count not in allowed:
        numbers = " or ".join(map(str, allowed))
        plural = "batch" if numbers == "1" else "batches"
        raise ValueError(
            f"{_owner(owner)}: {_owner(rule)} takes {numbers} {plural}, got {count}; {remedy}."
        )


def square(**matrices: Tensor) -> None:
    """Raise ``ValueError`` unless every tensor has shape ``[m, m]``."""
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`{name}` must have shape [m, m], got {list(matrix.shape)}.")


def vectors(owner: object, **values: Sequence[Sequence[float]]) -> None:
    """Raise ``ValueError`` unless there is at least one vector and all are of one length."""
    for name, value in values.items():
        lengths = sorted({len(vector) for vector in value})
        if len(lengths) != 1 or lengths == [0]:
            raise ValueError(
                f"{_owner(owner)}: `{name}` must be vectors with one number for each task, got "
                f"lengths {lengths}."
            )


def positive_losses(owner: object, values: Sequence[float] | None, names: Sequence[str]) -> None:
    """Raise ``ValueError`` naming the first task whose loss is not above zero."""
    for name, value in zip(names, values or (), strict=False):
        if value <= 0:
            raise ValueError(
                f"{_owner(owner)}: losses must be > 0, got {value:g} for task {name!r}; "
                "shift the loss or choose a rule that does not take its logarithm."
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the sentence that suggests the nearest known name, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[near[0]]!r}?" if near else ""
