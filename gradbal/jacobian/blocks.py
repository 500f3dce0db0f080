"""Storage for rows of the Jacobian, laid out so that gradients are views of it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from gradbal.distributed.layout import Columns, Spread

Room = Callable[..., Tensor]  # as torch.empty: a size, dtype and device -> storage


@dataclass
class Block:
    """Rows of the Jacobian for parameters of one group, device and dtype.

    Attributes:
        group: Name of the group.
        numbers: The parameters.
        rows: Storage, shape ``[m, n]``, preallocated.
        places: Shape, strides and offset of each of them.
        used: How many columns they take.
        averaged: Whether rows are to be averaged over processes.
        columns: How the columns are spread over processes.
    """

    group: str
    numbers: list[int]
    rows: Tensor
    places: list[tuple[torch.Size, tuple[int, ...], int]]
    used: int
    averaged: bool
    columns: Columns
    cache: dict[object, dict[int, Tensor]] = field(default_factory=dict)

    def mine(self, n_rows: int) -> Tensor:
        """View the rows in use where this process completes them and takes inner products."""
        return self.rows[:n_rows, self.columns.mine]

    def at(self, rows: int | slice) -> dict[int, Tensor]:
        """View one row, or several, as one tensor per parameter."""
        key = rows if isinstance(rows, int) else (rows.start, rows.stop)
        return self.cache.get(key) or self.views(self.rows[rows], key)

    def views(self, tensor: Tensor, key: object = None) -> dict[int, Tensor]:
        """View ``[..., n]`` as one tensor ``[..., *shape]`` per parameter, in its own strides.

        Gradients must have the strides of their parameter: fused optimizers rely on it.
        """
        if key in self.cache:
            return self.cache[key]
        lead, steps = tensor.shape[:-1], tensor.stride()[:-1]
        start = tensor.storage_offset()
        views = {
            number: tensor.as_strided((*lead, *shape), (*steps, *stride), start + offset)
            for number, (shape, stride, offset) in zip(self.numbers, self.places, strict=True)
        }
        if key is not None:
            self.cache[key] = views
        return views


class Workspace:
    """Storage that is lent again and again, to one block of a dtype and device at a time."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __call__(
        self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Return uninitialised storage."""
        kept, numel = self.kept.pop((dtype, device), None), prod(size)
        if kept is None or len(kept) < numel:
            kept = torch.empty(numel, dtype=dtype, device=device)
        self.kept[dtype, device] = kept
        return kept[:numel].view(size)


def lay_out(
    params: Sequence[Tensor],
    groups: Mapping[int, str],
    sparse: Iterable[int],
    n_rows: int,
    room: Room,
    spread: Spread,
) -> list[Block]:
    """Say where in blocks each parameter lies, and make room for them."""
    kinds: dict[tuple[str, torch.device, torch.dtype, Any], list[int]] = defaultdict(list)
    for number, group in groups.items():
        if number not in sparse:
            param, holding = params[number], spread.holding(number)
            kinds[group, param.device, param.dtype, holding].append(number)
    blocks = []
    for (group, device, dtype, holding), numbers in kinds.items():
        places, offset = [], 0
        for number in numbers:
            like = torch.empty_like(params[number], device="meta")
            places.append((like.shape, like.stride(), offset))
            offset += like.numel()
        columns = spread.columns(offset, holding)
        rows = room((n_rows, columns.width), dtype=dtype, device=device)
        blocks.append(Block(group, numbers, rows, places, offset, holding.averaged, columns))
    return blocks


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what storage for a tensor's gradient depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
