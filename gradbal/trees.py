"""Nested containers with tensors as leaves."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradbal.gram import added


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


def merged_sums(old: Mapping[int, Tensor], new: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the union, with sums where both have a tensor."""
    both = {key: added(old[key], new[key]) for key in old.keys() & new.keys()}
    return {**old, **new, **both}
