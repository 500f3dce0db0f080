"""Eigenvalues of a small symmetric matrix, on the host or without ever leaving the device."""

import torch
from torch import Tensor

from gradbal.solvers.equilibrate import equilibrate

SWEEPS = 8  # and one for every doubling of the size: zero eigenvalues converge last
EVEN = 1e-6  # ratio of eigenvalues down to which a common eigensolver keeps ten digits


def symmetric_eigen(matrix: Tensor, *, capturable: bool = False) -> tuple[Tensor, Tensor]:
    r"""Decompose :math:`A = V \operatorname{diag}(\lambda) V^\top`.

    The library's eigensolvers synchronise with the host, so with ``capturable`` a fixed number of
    Jacobi sweeps is done instead, every sweep in rounds of rotations that touch disjoint pairs.

    Args:
        matrix: Symmetric, shape ``[m, m]``.
        capturable: Use a fixed sequence of operations on the device.

    Returns:
        Eigenvalues, shape ``[m]`` (ascending on the host, in no order with ``capturable``), and
        the eigenvectors as columns, shape ``[m, m]``.

    Source:
        Jacobi's method with the round-robin order of Brent and Luk, 1985.

    Example:
        >>> symmetric_eigen(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())[0]
        tensor([1., 3.], dtype=torch.float64)
    """
    if not capturable:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    vectors = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    rounds = _round_robin(len(matrix), matrix.device)
    sweeps = SWEEPS + len(matrix).bit_length() if len(matrix) > 2 else 1  # one rotation is exact
    for _ in range(sweeps):
        for first, second in rounds:
            rotation = _rotation(matrix, first, second)
            matrix = rotation.T @ matrix @ rotation
            vectors = vectors @ rotation
    return matrix.diagonal(), vectors


def gram_eigen(gram: Tensor, *, tol: float, capturable: bool = False) -> tuple[Tensor, Tensor]:
    r"""Decompose a Gram matrix, small eigenvalues as precisely as large ones.

    Norms six decades apart give eigenvalues twelve decades apart, and a common eigensolver loses
    the small ones. But with cosines :math:`C = V \Lambda V^\top` and norms :math:`D` they are the
    squared singular values of :math:`D V \Lambda^{1/2}`, which come out precisely when its rows
    are sorted by length. Jacobi rotations, taken with ``capturable``, are as precise.

    Args:
        gram: Inner products, shape ``[m, m]``, symmetric, PSD up to rounding.
        tol: Eigenvalues of :math:`C` below this part of the largest count as zero, so that the
            rank does not depend on the norms.
        capturable: Use a fixed sequence of operations on the device.

    Returns:
        Eigenvalues, shape ``[m]``, in no order, exactly 0 where they count as zero, and the
        eigenvectors as columns, shape ``[m, m]``.

    Source:
        Demmel and Veselić, SIAM Journal on Matrix Analysis and Applications 13, 1992.

    Example:
        >>> gram = torch.tensor([[1e8, 5.0], [5.0, 1e-6]], dtype=torch.float64)
        >>> gram_eigen(gram, tol=1e-12)[0]
        tensor([1.0000e+08, 7.5000e-07], dtype=torch.float64)
    """
    if not capturable:
        values, vectors = torch.linalg.eigh(gram)
        if values[0].item() > max(EVEN, len(gram) * tol) * values[-1].item():
            return values, vectors
    cosines, norms = equilibrate(gram)
    largest = norms.amax()
    lengths = norms / largest.where(largest > 0, 1)
    inner, basis = symmetric_eigen(cosines, capturable=capturable)
    kept = inner > tol * inner.amax()
    if capturable:
        values, vectors = symmetric_eigen(cosines * lengths * lengths.unsqueeze(1), capturable=True)
        values, order = values.sort(descending=True)
        vectors = vectors[:, order]
    else:
        order = lengths.argsort(descending=True)
        root = (basis * inner.where(kept, 0).sqrt() * lengths.unsqueeze(1))[order]
        left, singular, _ = torch.linalg.svd(root)
        values, vectors = singular.square(), left[order.argsort()]
    positions = torch.arange(len(gram), device=gram.device)
    values = values.where(positions < kept.sum(), 0)
    return values * largest.square(), vectors


def _round_robin(m: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return rounds of disjoint pairs that together hold every pair once."""
    players = torch.arange(m, device=device)
    if m % 2:
        players = torch.cat((players.new_full((1,), -1), players))
    half = len(players) // 2
    rounds = []
    for _ in range(len(players) - 1):
        first, second = players[:half], players[half:].flip(0)
        if m % 2:  # whoever meets -1 rests: it always sits in the first pair
            first, second = first[1:], second[1:]
        rounds.append((first, second))
        players = torch.cat((players[:1], players[1:].roll(1)))
    return rounds


def _rotation(matrix: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the rotation that zeroes every entry ``[first, second]``."""
    off = matrix[first, second]
    gap = (matrix[second, second] - matrix[first, first]) / 2
    size = torch.hypot(gap, off)
    sign = torch.where(gap >= 0, 1.0, -1.0).to(matrix.dtype)
    tangent = off / (gap.abs() + size).where(size > 0, 1) * sign
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    rotation = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    rotation[first, first] = cosine
    rotation[second, second] = cosine
    rotation[first, second] = sine
    rotation[second, first] = -sine
    return rotation
