"""A step of a learned weight that cannot overshoot."""

import torch
from torch import Tensor

_SMALL = -700.0  # logarithm of what counts as nothing
_ROUNDS = 8  # of Newton's method, which has converged to rounding after six


def log_weight_step(product: Tensor, rate: float | Tensor) -> Tensor:
    r"""Minimise :math:`w L - \log w + (t - t_0)^2 / (2 \eta)` over :math:`t = \log w`.

    A gradient step of the first two terms goes far beyond their minimum :math:`w = 1 / L` where
    :math:`w L` is large. The proximal step ends before it, however large the rate: with
    :math:`q = w_0 L` it is :math:`t - t_0 = \eta - u`, :math:`u + \log u = \eta + \log(\eta q)`.

    Args:
        product: :math:`q`, not negative, any shape.
        rate: :math:`\eta`, positive.

    Returns:
        :math:`t - t_0`, of the same shape.

    Source:
        Rockafellar, SIAM Journal on Control and Optimization 14, 1976, for the proximal step;
        Corless et al., Advances in Computational Mathematics 5, 1996, for the equation.

    Example:
        >>> log_weight_step(torch.tensor([0.0, 1e6], dtype=torch.float64), 0.5)
        tensor([  0.5000, -10.7059], dtype=torch.float64)
    """
    rate = rate.to(product) if isinstance(rate, Tensor) else rate
    target = (rate + (rate * product).log()).clamp(min=_SMALL)
    root = torch.where(target > 1, target, target.clamp(max=1).exp())
    for _ in range(_ROUNDS):
        root = root * (1 + target - root.log()) / (1 + root)
    found: Tensor = rate - root
    return found
