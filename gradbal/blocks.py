"""Storage for rows of the Jacobian, laid out so that gradients are views of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Block:
    """Rows of the Jacobian for parameters of one group, device and dtype.

    Attributes:
        group: Name of the group.
        numbers: The parameters.
        rows: Storage, shape ``[m, n]``, preallocated.
        flat: Storage of the direction, shape ``[n]``; gradients are views of it.
    """

    group: str
    numbers: list[int]
    rows: Tensor
    flat: Tensor
    places: list[tuple[torch.Size, tuple[int, ...], int]]
    cache: dict[object, dict[int, Tensor]] = field(default_factory=dict)

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


def lay_out(
    params: Sequence[Tensor], groups: Mapping[int, str], sparse: Iterable[int], n_rows: int
) -> list[Block]:
    """Allocate blocks, and say where in them each parameter lies."""
    kinds: dict[tuple[str, torch.device, torch.dtype], list[int]] = defaultdict(list)
    for number, group in groups.items():
        if number not in sparse:
            kinds[group, params[number].device, params[number].dtype].append(number)
    blocks = []
    for (group, device, dtype), numbers in kinds.items():
        places, offset = [], 0
        for number in numbers:
            like = torch.empty_like(params[number], device="meta")
            places.append((like.shape, like.stride(), offset))
            offset += like.numel()
        rows = torch.empty((n_rows, offset), dtype=dtype, device=device)
        flat = torch.empty(offset, dtype=dtype, device=device)
        blocks.append(Block(group, numbers, rows, flat, places))
    return blocks


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Return what storage for a tensor's gradient depends on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
