"""The combination of vectors with the same projection on each of them."""

import numpy as np
import torch
from torch import Tensor

from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.gram import ROUNDING
from gradbal.solvers.min_norm import min_norm
from gradbal.solvers.spectral import symmetric_eigen

HARMLESS = 16  # rounding errors of the Gram matrix within which a direction harms no task
SPREAD = 1e-3  # of the norms, for a pseudo-inverse


def equal_projection(gram: Tensor, *, eps: float, capturable: bool = False) -> Tensor:
    r"""Find weights with :math:`(G w)_i / n_i` equal for all i, where :math:`n_i^2 = G_{ii}`.

    On unit vectors, with cosines :math:`C = V \Lambda V^\top`, this is
    :math:`C y = \mathbb 1` with :math:`w_i = y_i / n_i` up to scale. Eigenvalues below
    :math:`m \, \epsilon \, \lambda_{\max}` count as zero. If there are any, so that no such
    combination need exist, :math:`w` is the pseudo-inverse of :math:`G` times :math:`n`. Zero
    vectors get weight 0. Two have :math:`w = (n_2, n_1) / (n_1 + n_2)`, also where they are
    parallel, so that nothing jumps. The min-norm point over the unit vectors takes the place of a
    solution that would point uphill, for one vector or (weights without a positive sum) for all,
    and of a pseudo-inverse where norms lie more than three decades apart: that is mere rounding.

    Args:
        gram: Inner products, shape ``[m, m]``, symmetric, PSD, float64.
        eps: Relative rounding error of ``gram``.
        capturable: Use a fixed sequence of operations on the device.

    Returns:
        Weights that sum to 1, shape ``[m]``; zeros if every row is zero.

    Source:
        Liu et al., ICLR 2021, eq. 3; the fallback is the direction of Katrutsa et al.,
        arXiv 2007.06937.

    Example:
        >>> equal_projection(torch.tensor([[1.0, 0.0], [0.0, 9.0]]).double(), eps=1e-16)
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    if len(gram) == 2:
        return _two(gram)
    if not capturable and (found := _full_rank(gram, eps)) is not None:
        return found
    cosines, norms = equilibrate(gram)
    present = norms > 0
    smallest = norms.where(present, torch.inf).amin()  # the unit of length: nothing overflows
    units = torch.where(present, smallest / norms.where(present, 1), 0)
    values, vectors = symmetric_eigen(cosines, capturable=capturable)
    kept = values > len(gram) * eps * values.amax()
    inverse = torch.where(kept, 1 / values.where(kept, 1), 0)
    weights = vectors @ (inverse * (vectors.T @ present.to(gram.dtype))) * units
    full = kept.sum() == present.sum()
    lengths = norms / norms.amax().clamp(min=torch.finfo(norms.dtype).tiny)
    if capturable or not full:
        basis = lengths[:, None] * torch.where(kept, vectors, 0)
        weights = torch.where(full, weights, _pseudo_inverse(basis, inverse, lengths, kept))
    total = weights.sum()
    defined = full | (lengths.where(present, 1).amin() >= SPREAD)
    rounding = len(gram) * eps
    slopes = cosines @ (weights * lengths)
    downhill = (total > rounding * weights.abs().sum()) & (
        slopes >= -HARMLESS * len(gram) * ROUNDING * (weights.abs() * lengths).sum()
    ).all()
    downhill = downhill & defined
    if capturable or not downhill:
        # far away and orthogonal, absent tasks do not change the others' min-norm point
        apart = cosines + len(gram) * torch.where(present, 0.0, 1.0).to(gram.dtype).diag()
        fallback = min_norm(apart, capturable=capturable).value * units
        weights = torch.where(downhill, weights, fallback)
        total = weights.sum()
    return weights / total.where(total != 0, 1)


def _two(gram: Tensor) -> Tensor:
    """Return ``(n_2, n_1) / (n_1 + n_2)``; a zero vector gets weight 0."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    shares = norms.flip(0) / norms.sum().clamp(min=torch.finfo(norms.dtype).tiny)
    return torch.where((norms > 0).all(), shares, norms.sign())


def _full_rank(gram: Tensor, eps: float) -> Tensor | None:
    """Return the solution where it is beyond doubt: full rank, and downhill for all.

    In NumPy, whose operations on a few numbers take half the time of torch's.
    """
    matrix = gram.numpy()
    norms = np.sqrt(np.maximum(matrix.diagonal(), 0))
    if not norms.all():
        return None
    try:
        inverse = np.linalg.inv(matrix / norms / norms[:, None])
    except np.linalg.LinAlgError:
        return None
    weights = inverse.sum(axis=1) * (norms.min() / norms)
    total = weights.sum()
    # the norm of the inverse bounds the smallest eigenvalue, and that of the cosines is below m
    certain = np.linalg.norm(inverse) * len(norms) ** 2 * eps < 1
    if not certain or total <= len(norms) * eps * np.abs(weights).sum():
        return None
    return torch.from_numpy(weights / total)


def _pseudo_inverse(basis: Tensor, inverse: Tensor, vector: Tensor, kept: Tensor) -> Tensor:
    r"""Apply the pseudo-inverse of :math:`B \Lambda B^\top` to a vector.

    Args:
        basis: :math:`B`, shape ``[m, m]``; independent columns, zero where not kept.
        inverse: Inverse of :math:`\Lambda`, shape ``[m]``.
        vector: Shape ``[m]``.
        kept: Which columns count.
    """
    normal = basis.T @ basis + torch.where(kept, 0.0, 1.0).to(basis.dtype).diag()
    inner: Tensor = torch.linalg.solve_ex(normal, basis.T @ vector).result
    outer: Tensor = torch.linalg.solve_ex(normal, inverse * inner).result
    return basis @ outer
