"""The projection onto the simplex."""

import torch
from torch import Tensor

FEW = 32


def project_simplex(point: Tensor, *, capturable: bool = False) -> Tensor:
    r"""Find the nearest point of :math:`\{w \ge 0 : \sum_i w_i = 1\}`.

    Args:
        point: Shape ``[m]``; an entry of ``-inf`` becomes 0, as long as not all are.
        capturable: Use tensor operations, nothing read back; else plain numbers, which are faster
            for a few tasks.

    Returns:
        :math:`\max(x - \theta, 0)` with the :math:`\theta` for which it sums to 1, shape ``[m]``.

    Source:
        Held, Wolfe and Crowder, Mathematical Programming 6, 1974.

    Example:
        >>> project_simplex(torch.tensor([0.9, 0.5, -1.0], dtype=torch.float64))
        tensor([0.7000, 0.3000, 0.0000], dtype=torch.float64)
    """
    if not capturable and len(point) <= FEW:
        return _in_numbers(point)
    point = point - point.amax()
    counts = torch.arange(1, len(point) + 1, dtype=point.dtype, device=point.device)
    sums = point.sort(descending=True).values.cumsum(0)
    weights = (point - ((sums - 1) / counts).amax()).clamp(min=0)
    return weights / weights.sum()


def _in_numbers(point: Tensor) -> Tensor:
    numbers: list[float] = point.tolist()
    largest = max(numbers)
    total, threshold = 0.0, -1.0
    for count, number in enumerate(sorted(numbers, reverse=True), 1):
        total += number - largest
        threshold = max(threshold, (total - 1) / count)
    weights = [max(number - largest - threshold, 0.0) for number in numbers]
    size = sum(weights)
    return point.new_tensor([weight / size for weight in weights])
