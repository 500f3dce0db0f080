"""One look at what a backward pass found, in one trip to the host."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal.distributed import Processes, shared_out
from gradbal.solvers.gram import largest_entries, needs_scaling

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
        left_out: Positions of tasks that take no part in this step.
    """

    grams: dict[str, Tensor]
    losses: Tensor
    values: list[float] | None
    bad: list[int]
    what: str = "loss"
    left_out: Sequence[int] = ()


def survey(
    grams: Grams,
    losses: Tensor,
    owned: Sequence[tuple[int, Tensor]],
    scale: Tensor | None,
    processes: Processes,
    *,
    capturable: bool,
) -> Survey:
    """Bring Gram matrices, losses and what must be finite to where they are looked at.

    Args:
        grams: Computes the Gram matrices; its argument asks for protection against under- and
            overflow, which costs one more read of the gradients.
        losses: Losses, shape ``[m]``.
        owned: Gradients that must be finite, too, each with the position of its task or -1.
        scale: Factor by which all gradients were multiplied, 0-dim, or None.
        processes: Each of which has a part of inner products and losses.
        capturable: Leave all on the device and look at nothing.
    """
    m, device = len(losses), losses.device
    found = {group: gram.to(device) for group, gram in grams(capturable).items()}
    if capturable:
        factor = 1 if scale is None else scale.to(losses) ** 2
        return Survey({group: gram / factor for group, gram in found.items()}, losses, None, [])
    sizes = largest_entries([grad for _, grad in owned], device)
    factors = [] if scale is None else [scale.to(device)[None]]
    parts = [gram.flatten() for gram in found.values()]
    same = [shared_out(part, processes.size) for part in (sizes, *factors)]
    packed = processes.sum(torch.cat([losses, *same, *parts])).cpu()
    numbers = packed.tolist()
    n_before = m + len(owned) + len(factors)
    values, own = numbers[:m], numbers[m : m + len(owned)]
    squares, diagonals = {}, {}
    for group, gram in found.items():
        side, n_after = len(gram), n_before + gram.numel()
        squares[group] = packed[n_before:n_after].view(side, side)
        diagonals[group] = numbers[n_before : n_after : side + 1]
        n_before = n_after
    if any(needs_scaling(diagonal) for diagonal in diagonals.values()):
        squares = {
            group: processes.sum(gram.flatten()).cpu() for group, gram in grams(True).items()
        }
        squares = {group: gram.view(found[group].shape) for group, gram in squares.items()}
        diagonals = {group: gram.diagonal().tolist() for group, gram in squares.items()}
    bad = {i % m for diagonal in diagonals.values() for i in _not_finite(diagonal)}
    bad |= {owned[i][0] for i in _not_finite(own)}
    if scale is not None:
        squares = {group: gram / numbers[m + len(owned)] ** 2 for group, gram in squares.items()}
    if bad:
        return Survey(squares, packed[:m], values, sorted(bad), "gradient")
    return Survey(squares, packed[:m], values, _not_finite(values))


def _not_finite(numbers: Sequence[float]) -> list[int]:
    return [i for i, number in enumerate(numbers) if not math.isfinite(number)]


def survey_losses(
    losses: Tensor, aux: Tensor | None, total: Callable[[Tensor], Tensor], *, capturable: bool
) -> Survey:
    """Bring losses alone to where they are looked at, auxiliary ones among them.

    Args:
        losses: Losses, shape ``[m]``.
        aux: Auxiliary losses, 1-D.
        total: Sums numbers over processes.
        capturable: Look at nothing.
    """
    if capturable:
        return Survey({}, losses, None, [])
    m = len(losses)
    found = total(losses if aux is None else torch.cat((losses, aux.to(losses)))).cpu()
    values = found.tolist()
    bad = [i if i < m else -1 for i in _not_finite(values)]
    return Survey({}, found[:m], values[:m], bad)
