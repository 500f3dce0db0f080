"""Losses that leave missing labels out.

Outputs have shape ``[n, channels, ...]``; targets have the same, or no axis of channels. A label is
missing where a number is NaN or a class is negative. Every loss is a mean over the labels that are
there. Without any it is a zero without graph, and so the task is absent.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def labelled(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets where there is a label, in rows.

    Args:
        outputs: Shape ``[n, channels, ...]``.
        targets: Shape ``[n, ...]`` or ``[n, channels, ...]``.

    Returns:
        Outputs, shape ``[k, channels]``, and targets, shape ``[k]`` or ``[k, channels]``.
    """
    outputs = outputs.movedim(1, -1)
    known = ~targets.isnan() if targets.is_floating_point() else targets >= 0
    if targets.ndim == outputs.ndim:
        targets, known = targets.movedim(1, -1), known.all(dim=1)
    return outputs[known], targets[known]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of one class among several; targets are their numbers."""
    return _mean(F.cross_entropy, outputs, targets)


def binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of yes or no; targets are 1 or 0, outputs one logit each."""
    return _mean(lambda x, y: F.binary_cross_entropy_with_logits(x[:, 0], y), outputs, targets)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error of a number."""
    return _mean(lambda x, y: F.mse_loss(x[:, 0], y), outputs, targets)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean absolute error of a number."""
    return _mean(lambda x, y: F.l1_loss(x[:, 0], y), outputs, targets)


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one less the mean cosine of the angle between two vectors."""
    return _mean(lambda x, y: 1 - F.cosine_similarity(x, y).mean(), outputs, targets)


def _mean(loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    rows, wanted = labelled(outputs, targets)
    return loss(rows, wanted) if len(wanted) else outputs.new_zeros(())
