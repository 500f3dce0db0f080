"""Where the channels of a stage's output lie: stated, or derived from the stage's last layer."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from arch_zoo.tensors import channel_axis

WIDTHS = ("out_channels", "out_features", "num_channels", "num_features", "embedding_dim")


class Width(NamedTuple):
    """Width of the last layer of a stage that has one.

    Args:
        channels: The width.
        last: Whether such a layer puts it on the last axis.
    """

    channels: int
    last: bool


def width_of(module: nn.Module) -> Width | None:
    """Return the width of the last layer, in the order of registration, or None if there is none.

    Example:
        >>> width_of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
        Width(channels=8, last=False)
    """
    for layer in reversed(list(module.modules())):
        if isinstance(layer, nn.LayerNorm):
            return Width(layer.normalized_shape[-1], True)
        found = [getattr(layer, name, None) for name in WIDTHS]
        sizes = [size for size in found if isinstance(size, int) and size > 0]
        if sizes and type(layer).__module__.startswith("torch.nn"):
            return Width(sizes[0], isinstance(layer, nn.Linear | nn.Embedding))
    return None


def widths_of(parts: Iterable[nn.Module]) -> list[Width | None]:
    """Return the widths of parts that follow each other; one without a layer keeps the last."""
    found: list[Width | None] = []
    for part in parts:
        found.append(width_of(part) or (found[-1] if found else None))
    return found


def axis_of(owner: str, where: str, x: Tensor, layout: str | None, width: Width | None) -> int:
    """Return the axis of the channels of what a stage returned.

    Args:
        owner: Whose stage it is, for the error.
        where: Which stage, for the error.
        x: What it returned.
        layout: As stated by the user, or None.
        width: Of the stage's last layer.

    Raises:
        ValueError: If the stated axis is not as wide as the last layer, and another one is; or if
            the layout has other axes.
    """
    if x.ndim < 3:
        return 1
    fits = [] if width is None else [a for a in range(1, x.ndim) if x.shape[a] == width.channels]
    if layout is not None:
        try:
            axis = channel_axis(x.ndim, layout)
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from None
        if width is not None and fits and axis not in fits:
            raise ValueError(
                f"{owner}: `layout` must put the channels where {where} has its "
                f"{width.channels}, got {layout!r} for {list(x.shape)}."
            )
        return axis
    guess = channel_axis(x.ndim)
    if width is None or not fits or len({guess, *fits}) == 1:
        return guess
    preferred = x.ndim - 1 if width.last else 1
    if len(fits) == 1:
        return fits[0]
    return guess if width.last and guess in fits else preferred if preferred in fits else fits[0]
