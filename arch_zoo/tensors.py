"""What architectures do to tensors.

Axes are (batch, channels, positions ...) or, when there are three, (batch, tokens, channels).
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def channels_first(x: Tensor) -> Tensor:
    """Swap channels and tokens of a token sequence, which undoes itself; leave others alone."""
    return x.transpose(1, 2) if x.ndim == 3 else x


def pooled(x: Tensor) -> Tensor:
    """Return the mean over all positions, shape ``[batch, channels]``; vectors stay as they are."""
    return x if x.ndim < 3 else channels_first(x).flatten(2).mean(2)


def stack(owner: str, what: str, parts: Mapping[str, Tensor]) -> Tensor:
    """Stack tensors of one shape along a new second axis.

    Args:
        owner: Whose parts these are, for the error.
        what: What the parts are, for the error.
        parts: Tensors by label, each ``[batch, ...]``.

    Returns:
        Shape ``[batch, len(parts), ...]``.

    Raises:
        ValueError: If the shapes disagree.
    """
    if len({part.shape for part in parts.values()}) > 1:
        came = ", ".join(f"{list(part.shape)} of {label}" for label, part in parts.items())
        raise ValueError(f"{owner}: {what} must have one shape, got {came}.")
    return torch.stack(list(parts.values()), dim=1)


def mix(axes: str, weights: Tensor, items: Tensor) -> Tensor:
    """Sum items with weights.

    Args:
        axes: Of the weights: ``"e"`` one per item, ``"be"`` also per example, ``"ec"`` also per
            channel.
        weights: One axis per letter.
        items: Shape ``[batch, items, ...]``.

    Returns:
        Shape ``[batch, ...]``.

    Example:
        >>> items = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> mix("be", torch.tensor([[0.5, 0.5]]), items)
        tensor([[2., 3.]])
    """
    if axes != "ec":
        return torch.einsum(f"{axes},be...->b...", weights, items)
    positions = [] if items.ndim == 4 else [1] * (items.ndim - 3)
    factors = weights.reshape(*weights.shape, *positions).unbind(0)
    total, *rest = items.unbind(1)
    total = factors[0] * total
    for factor, item in zip(factors[1:], rest, strict=True):
        total = torch.addcmul(total, factor, item)  # a product over channels would copy items
    return total
