"""What architectures do to tensors, and to the tensors of a structure."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LAYOUTS = ("NC", "NCL", "NLC", "NCHW", "NHWC", "NCDHW", "NDHWC")


def check_layout(owner: str, layout: str | None) -> None:
    """Raise unless it is None or a known layout."""
    if layout is not None and layout not in LAYOUTS:
        known = ", ".join(map(repr, LAYOUTS))
        raise ValueError(f"{owner}: `layout` must be None or one of {known}, got {layout!r}.")


def channel_axis(ndim: int, layout: str | None = None) -> int:
    """Return the axis of channels.

    Args:
        ndim: Number of axes of a tensor.
        layout: How features with positions lie, such as ``"NHWC"``; without, a tensor of three axes
            is (batch, tokens, channels) and any other (batch, channels, positions ...).

    Raises:
        ValueError: If the layout has another number of axes; vectors fit any.
    """
    if ndim == 2:
        return 1
    if layout is None:
        return 2 if ndim == 3 else 1
    if len(layout) != ndim:
        raise ValueError(
            f"`layout` must name the axes of all features but vectors, got {layout!r} for features "
            f"of {ndim} axes."
        )
    return layout.index("C")


def channels_first(x: Tensor, axis: int) -> Tensor:
    """Move the channels from an axis to the second."""
    return x if axis == 1 else x.movedim(axis, 1)


def channels_back(x: Tensor, axis: int) -> Tensor:
    """Move the channels from the second axis to another; vectors stay as they are."""
    return x if axis == 1 or x.ndim == 2 else x.movedim(1, axis)


def pooled(
    x: Tensor,
    mask: Tensor | None = None,
    layout: str | None = None,
    *,
    axis: int | None = None,
) -> Tensor:
    """Return the mean over all positions, shape ``[batch, channels]``; vectors stay as they are.

    Args:
        x: Features.
        mask: Not zero at the positions to average over, ``[batch, positions ...]``. Where the mask
            of an example is zero everywhere, its mean is zero.
        layout: How features lie, as in :func:`channel_axis`.
        axis: Where the channels are, if that is known better.

    Raises:
        ValueError: If the mask has not the shape of the positions.

    Example:
        >>> pooled(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
        tensor([[2.]])
    """
    if x.ndim < 3:
        return x
    x = channels_first(x, channel_axis(x.ndim, layout) if axis is None else axis)
    if mask is None:
        return x.flatten(2).mean(2)
    positions = [x.shape[0], *x.shape[2:]]
    if list(mask.shape) != positions:
        raise ValueError(
            f"`attention_mask` must have the shape of the positions, {positions}, got "
            f"{list(mask.shape)}."
        )
    counts = (mask != 0).to(x.dtype).flatten(1)
    total = torch.einsum("bcl,bl->bc", x.flatten(2), counts)
    return total / counts.sum(1, keepdim=True).clamp(min=1)


def stack(owner: str, what: str, parts: Mapping[str, Any]) -> Any:
    """Stack tensors of one shape along a new second axis; structures leaf by leaf.

    Args:
        owner: Whose parts these are, for the error.
        what: What the parts are, for the error.
        parts: Tensors by label, each ``[batch, ...]``, or structures of such tensors.

    Returns:
        Shape ``[batch, len(parts), ...]``.

    Raises:
        ValueError: If the shapes or structures disagree.
    """
    first, *others = parts.values()
    if not isinstance(first, Tensor):
        flat = {label: pytree.tree_flatten(part) for label, part in parts.items()}
        specs = [spec for _, spec in flat.values()]
        if any(spec != specs[0] for spec in specs) or not all(
            isinstance(leaf, Tensor) for leaf in flat[next(iter(flat))][0]
        ):
            kinds = ", ".join(f"{type(part).__name__} of {label}" for label, part in parts.items())
            raise ValueError(f"{owner}: {what} must be alike and hold tensors only, got {kinds}.")
        columns = zip(*(leaves for leaves, _ in flat.values()), strict=True)
        leaves = [stack(owner, what, dict(zip(flat, column, strict=True))) for column in columns]
        return pytree.tree_unflatten(leaves, specs[0])
    # one after the other, because sizes that are symbols cannot be put into a set
    if any(part.shape != first.shape for part in others):
        came = ", ".join(f"{list(part.shape)} of {label}" for label, part in parts.items())
        raise ValueError(f"{owner}: {what} must have one shape, got {came}.")
    return torch.stack(list(parts.values()), dim=1)


def mix(axes: str, weights: Tensor, items: Any, channels: int = 1) -> Any:
    """Sum items with weights; structures leaf by leaf.

    Args:
        axes: Of the weights: ``"e"`` one per item, ``"be"`` also per example, ``"ec"`` also per
            channel.
        weights: One axis per letter.
        items: Shape ``[batch, items, ...]``.
        channels: Axis of the channels within the result.

    Returns:
        Shape ``[batch, ...]``.

    Example:
        >>> items = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> mix("be", torch.tensor([[0.5, 0.5]]), items)
        tensor([[2., 3.]])
    """
    if not isinstance(items, Tensor):
        return pytree.tree_map(lambda leaf: mix(axes, weights, leaf, channels), items)
    if axes != "ec":
        return torch.einsum(f"{axes},be...->b...", weights, items)
    positions = [1] * (items.ndim - 2 - channels)
    factors = weights.reshape(*weights.shape, *positions).unbind(0)
    total, *rest = items.unbind(1)
    total = factors[0] * total
    for factor, item in zip(factors[1:], rest, strict=True):
        total = torch.addcmul(total, factor, item)  # a product over channels would copy items
    return total


def add(one: Any, other: Any) -> Any:
    """Add tensors, or structures leaf by leaf."""
    if isinstance(one, Tensor):
        return one + other
    return pytree.tree_map(torch.add, one, other)


def blend(weights: Tensor, banks: Sequence[Any]) -> Any:
    """Mix banks ``[batch, n_i, ...]`` with weights ``[batch or 1, sum of n_i]``."""
    shares = torch.split(weights, [leaves_of(bank)[0].shape[1] for bank in banks], dim=1)
    parts = [mix("be", share, bank) for share, bank in zip(shares, banks, strict=True)]
    return reduce(add, parts)


def leaves_of(value: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a structure, in order."""
    if isinstance(value, Tensor):
        return (value,)
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def views_of(value: Any) -> Any:
    """Return a structure of views, so that none lies on the way to another."""
    if isinstance(value, Tensor):
        return value.view_as(value)
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.view_as(leaf), value)
