"""Nested containers with tensors as leaves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradbal.solvers.gram import added


def cloned(tree: Any) -> Any:  # as deep as it goes
    """Return a copy whose tensors are copies, too."""
    if isinstance(tree, Mapping):
        return {key: cloned(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return list(tree)
    return tree.clone() if isinstance(tree, Tensor) else tree


def shallow(tree: Any) -> Any:  # as deep as it goes
    """Return a copy of the containers; what they hold is the same."""
    if isinstance(tree, dict):
        return {key: shallow(value) for key, value in tree.items()}
    return tree.copy() if isinstance(tree, list | set) else tree


@contextmanager
def undoable(
    owner: object, containers: Sequence[str], generator: torch.Generator | None
) -> Iterator[Callable[[], None]]:
    """Undo every rebinding of attributes if the body fails.

    Args:
        owner: Whose attributes these are.
        containers: Names of those that are written into and therefore copied; what they hold is
            not.
        generator: Put back, too; reading it may wait for the device.

    Yields:
        A function that undoes every change made so far.
    """
    before = {**owner.__dict__, **{name: shallow(getattr(owner, name)) for name in containers}}
    drawn = None if generator is None else generator.get_state()

    def undo() -> None:
        owner.__dict__.update(before, **{name: shallow(before[name]) for name in containers})
        if generator is not None and drawn is not None:
            generator.set_state(drawn)

    try:
        yield undo
    except BaseException:
        undo()
        raise


def merged_sums(old: Mapping[int, Tensor], new: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the union, with sums where both have a tensor."""
    both = {key: added(old[key], new[key]) for key in old.keys() & new.keys()}
    return {**old, **new, **both}
