"""Bring a Gram matrix to unit diagonal, so that no solver sees the units of the losses."""

import torch
from torch import Tensor

RIDGE = 1e-9  # the largest with which no task is harmed beyond the rounding of bfloat16 rows


def equilibrate(gram: Tensor) -> tuple[Tensor, Tensor]:
    r"""Split a Gram matrix into cosines and norms: :math:`G_{ij} = n_i\, C_{ij}\, n_j`.

    Each factor is divided out on its own, because :math:`n_i n_j` may overflow where
    :math:`G_{ij} / n_i / n_j` does not.

    Args:
        gram: Inner products of the task gradients, shape ``[m, m]``, PSD up to rounding.

    Returns:
        The cosines, shape ``[m, m]``, exactly symmetric, with exact ones on the diagonal, and the
        norms, shape ``[m]``. A task whose diagonal entry is zero has norm 0 and a row of zeros.

    Source:
        The diagonal scaling within :math:`\sqrt m` of the best one: van der Sluis, Numerische
        Mathematik 14, 1969.

    Example:
        >>> equilibrate(torch.tensor([[4.0, -3.0], [-3.0, 9.0]], dtype=torch.float64))[0]
        tensor([[ 1.0000, -0.5000],
                [-0.5000,  1.0000]], dtype=torch.float64)
    """
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = norms.reciprocal().nan_to_num(nan=torch.nan, posinf=0.0)
    halves = gram * (0.5 * inverse).unsqueeze(1) * inverse
    cosines = halves + halves.T
    cosines.diagonal().copy_(norms.sign())
    return cosines, norms


def ridged(cosines: Tensor, eps: float) -> Tensor:
    """Add the noise of the rows to the diagonal: within it weights are not unique.

    Args:
        cosines: As of :func:`equilibrate`, shape ``[m, m]``.
        eps: Relative rounding error of a squared norm.
    """
    ridge = min(len(cosines) * eps, RIDGE)
    return cosines + cosines.new_full((len(cosines),), ridge).diag()
