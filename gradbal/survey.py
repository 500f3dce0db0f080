"""One look at what a backward pass found, in one trip to the host."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal.gram import needs_scaling

Grams = Callable[[bool], dict[str, Tensor]]


@dataclass
class Survey:
    """Gram matrices and losses where the rule will look at them.

    Attributes:
        grams: The Gram matrix of each group, over all present tasks, float64; with several
            batches over the tasks of each in turn.
        losses: Losses, shape ``[m]``, on the same device.
        values: The losses as numbers, or None if nothing was read back.
        bad: Positions of tasks for which something is not finite; -1 stands for the auxiliary
            losses.
        what: What it is, ``"gradient"`` or ``"loss"``.
    """

    grams: dict[str, Tensor]
    losses: Tensor
    values: list[float] | None
    bad: list[int]
    what: str = "loss"


def survey(
    grams: Grams,
    losses: Tensor,
    sizes: Tensor,
    extra: Tensor,
    scale: Tensor | None,
    *,
    capturable: bool,
) -> Survey:
    """Bring Gram matrices, losses and what must be finite to where they are looked at.

    Args:
        grams: Computes the Gram matrices; its argument asks for protection against under- and
            overflow, which costs one more read of the gradients.
        losses: Losses, shape ``[m]``.
        sizes: Largest entry of each task's own gradients, shape ``[m]``.
        extra: Largest entry of the auxiliary gradients, 0-dim.
        scale: Factor by which all gradients were multiplied, 0-dim, or None.
        capturable: Leave all on the device and look at nothing.
    """
    m, device = len(losses), losses.device
    found = {group: gram.to(device) for group, gram in grams(capturable).items()}
    rest = [
        losses,
        sizes,
        extra[None],
        torch.ones_like(extra)[None] if scale is None else scale.to(extra)[None],
    ]
    if capturable:
        found = {group: gram / rest[3] ** 2 for group, gram in found.items()}
        return Survey(found, losses, None, [])
    packed = torch.cat([*(gram.flatten() for gram in found.values()), *rest]).cpu()
    sizes_of = [gram.numel() for gram in found.values()]
    *blocks, values, own, beside, factor = torch.split(packed, [*sizes_of, m, m, 1, 1])
    squares = {
        group: block.view_as(gram)
        for (group, gram), block in zip(found.items(), blocks, strict=True)
    }
    if any(needs_scaling(gram) for gram in squares.values()):
        squares = {group: gram.cpu() for group, gram in grams(True).items()}
    bad = {i % m for gram in squares.values() for i in _not_finite(gram.diagonal().tolist())}
    bad |= set(_not_finite(own.tolist()))
    bad |= {-1 for _ in _not_finite(beside.tolist())}
    squares = {group: gram / factor**2 for group, gram in squares.items()}
    numbers = values.tolist()
    if bad:
        return Survey(squares, values, numbers, sorted(bad), "gradient")
    return Survey(squares, values, numbers, _not_finite(numbers))


def _not_finite(numbers: Sequence[float]) -> list[int]:
    return [i for i, number in enumerate(numbers) if not math.isfinite(number)]


def survey_losses(losses: Tensor, aux: Tensor | None = None, *, capturable: bool) -> Survey:
    """Look at losses alone, auxiliary ones among them."""
    if capturable:
        return Survey({}, losses, None, [])
    beside = 0 if aux is None else len(aux)
    values = (losses if aux is None else torch.cat((losses, aux.to(losses.device)))).tolist()
    bad = [i if i < len(losses) else -1 for i in _not_finite(values)]
    return Survey({}, losses, values[: len(values) - beside], bad)
