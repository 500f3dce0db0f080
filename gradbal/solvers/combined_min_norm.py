"""The shortest vector of the convex hull of some vectors and some of their combinations."""

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.solvers.equilibrate import equilibrate
from gradbal.solvers.min_norm import min_norm
from gradbal.solvers.solution import Solution

_UNUSED = 1e-12  # share of the largest, by length, below which a vector is not in use
_ROUNDED = 1e-9  # how far shares may be below 0
_LONGER = 1 + 1e-6  # what squares of lengths may differ by, from rounding


def combined_min_norm(
    gram: Tensor, sides: Tensor, part: Tensor, *, eps: float, capturable: bool = False
) -> Solution:
    r"""Find the shortest :math:`J^\top w` where w is in the hull of some rows of I and S.

    The shares of these rows come from :func:`min_norm` on the inner products of all vectors. But
    where the rows of :math:`J` differ much in length, those of :math:`S J` are nearly parallel to
    the longest, and their inner products hardly tell them apart. So the equations are solved once
    more on the support that was found, with its rows of :math:`J` taken out of those of
    :math:`S J`: in these unknowns nothing cancels.

    Args:
        gram: Inner products of the rows of :math:`J`, shape ``[m, m]``, PSD up to rounding.
        sides: :math:`S`, shape ``[p, m]``.
        part: Which of the vectors, rows of :math:`J` first, are in the hull; bool, ``[m + p]``.
        eps: Relative rounding error of ``gram``.
        capturable: Run a fixed sequence of tensor operations, nothing read back.

    Returns:
        The weights :math:`w`, shape ``[m]``, 0 if the hull is empty, with the residual of
        :func:`min_norm`.

    Raises:
        ValueError: If ``gram`` is not square.

    Source:
        Désidéri, Comptes Rendus Mathématique 350, 2012; the change of unknowns is ours.

    Example:
        >>> gram = torch.tensor([[2.0, -3.0], [-3.0, 10.0]], dtype=torch.float64)
        >>> sides = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        >>> combined_min_norm(gram, sides, torch.tensor([True, True, False]), eps=1e-16).value
        tensor([0.7222, 0.2778], dtype=torch.float64)
    """
    checks.square(gram=gram)
    m = len(gram)
    rows = torch.cat((torch.eye(m, dtype=gram.dtype, device=gram.device), sides))
    own = torch.arange(len(rows), device=gram.device) < m
    if not capturable:
        index = part.nonzero().squeeze(-1)
        if len(index) == 0:
            return Solution(torch.zeros_like(gram[0]), gram.new_zeros(()), 0, part.new_ones(()))
        rows, own, part = rows[index], own[index], part[index]
    lengths = gram.diagonal().clamp(min=0).sqrt()
    products = rows @ gram @ rows.T
    zero = products.diagonal() <= 4 * m * eps * (rows.abs() @ lengths).square()
    products = products.masked_fill(zero | zero.unsqueeze(-1), 0)
    if capturable:  # vectors orthogonal to all others do not change the proportions of these
        apart = torch.where(part, 0, products.diagonal().amax()).diag()
        products = products.where(part & part.unsqueeze(-1), apart)
    solution = min_norm(products, capturable=capturable)
    shares = solution.value.where(part, 0)
    shares = shares / shares.sum().where(part.any(), 1)
    weights = shares @ rows
    if capturable or not own.all():
        used = shares * products.diagonal().sqrt()
        used = used > _UNUSED * used.amax()
        weights = _refine(gram, rows, own, used, weights)
    return solution._replace(value=weights)


def _refine(gram: Tensor, rows: Tensor, own: Tensor, used: Tensor, weights: Tensor) -> Tensor:
    """Solve again for the vectors in use; where that fails, return the weights there are."""
    taken = (own & used).to(gram.dtype) @ rows  # 1 for the rows of J in use
    rest = torch.where(own.unsqueeze(-1), rows, rows * (1 - taken))
    sums = torch.where(own, 1, 1 - rows @ taken)
    cosines, lengths = equilibrate(rest @ gram @ rest.T)
    eye = torch.eye(len(rows), dtype=gram.dtype, device=gram.device)
    matrix = torch.where(used & used.unsqueeze(-1), cosines, eye)
    points = torch.linalg.solve_ex(matrix, torch.where(used, sums / lengths, 0))[0]
    points = torch.where(used, points / lengths, 0)
    points = points / (sums @ points)
    inside = points.where(own, 0)
    shares = points - torch.where(own, rows @ (taken * ((points - inside) @ rows)), 0)
    refined = points @ rest
    kept = (shares >= -_ROUNDED * shares.abs().amax()).all() & (
        refined @ gram @ refined <= _LONGER * (weights @ gram @ weights)
    )
    return torch.where(kept, refined, weights)
