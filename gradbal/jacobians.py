"""What `aggregate` is given: checked, and brought to where rules look at it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal import checks
from gradbal.gram import TINY, gram_matrix, needs_scaling
from gradbal.rule import Rule, State

_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in _KINDS}  # to sum in


def check_arguments(
    jacobian: Tensor, rule: Rule, losses: Any, more: Sequence[object]
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return Jacobian and losses, shape ``[m]``, float64, without graph."""
    if not isinstance(jacobian, Tensor) or not jacobian.is_floating_point():
        kind = jacobian.dtype if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise TypeError(f"aggregate: `jacobian` must be a floating-point tensor, got {kind}.")
    if jacobian.ndim != 2 or not jacobian.numel():
        raise ValueError(
            "aggregate: `jacobian` must have shape [m, n], one row per task, "
            f"got {list(jacobian.shape)}."
        )
    if more or rule.batches[0] > 1:
        checks.batches(
            "aggregate", rule, rule.batches, len(more) + 1, "`more` holds the further ones"
        )
    for rows in more:
        if isinstance(rows, Tensor) and rows.shape != jacobian.shape:
            raise ValueError(
                f"aggregate: every Jacobian in `more` must have shape {list(jacobian.shape)}, "
                f"got {list(rows.shape)}."
            )
    if losses is None:
        if rule.needs_losses:
            raise ValueError(
                f"aggregate: {type(rule).__name__} looks at the losses; pass `losses=`, one per "
                "row."
            )
        return jacobian.detach(), jacobian.new_ones(jacobian.shape[0], dtype=torch.float64)
    try:
        values = torch.as_tensor(losses, dtype=torch.float64, device=jacobian.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"aggregate: `losses` must be numbers, one per row, got {losses!r}."
        ) from error
    if values.shape != (len(jacobian),):
        raise ValueError(
            f"aggregate: `losses` must have shape [{len(jacobian)}], got {list(values.shape)}."
        )
    return jacobian.detach(), values.detach()


def host_gram(batches: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Return the inner products of all rows, on the host, and whether some row is tiny.

    Raises:
        ValueError: If an entry is not finite.
    """
    rows = batches[0] if len(batches) == 1 else torch.cat([*batches])
    gram = gram_matrix(rows).cpu()
    if not needs_scaling(gram.diagonal().tolist()):
        return gram, False
    gram = gram_matrix(rows, scaled=True).cpu()
    squares = gram.diagonal().tolist()
    check_finite(squares)
    return gram, any(0 < square < TINY for square in squares)


def check_rows(jacobian: Tensor) -> None:
    """Raise ``ValueError`` naming the first row with an entry that is not finite."""
    total = jacobian.sum(dtype=WIDE[jacobian.dtype])  # one that is not finite shows in it
    if not math.isfinite(total.item()):
        check_finite(jacobian.abs().amax(dim=1).tolist())


def check_width(buffers: State, jacobian: Tensor) -> None:
    """Raise ``ValueError`` if what a rule kept belongs to other parameters."""
    for tensor in buffers.values():
        if tensor.shape[-1] != jacobian.shape[1]:
            raise ValueError(
                f"aggregate: `state` belongs to {tensor.shape[-1]} parameters, the Jacobian has "
                f"{jacobian.shape[1]} columns; pass None to start anew."
            )


def check_finite(numbers: Sequence[float]) -> None:
    """Raise ``ValueError`` naming the first number that is not finite."""
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(
                f"aggregate: row or loss {i} is not finite; every entry must be a number."
            )
