"""What every solver returns."""

from typing import NamedTuple

from torch import Tensor


class Solution(NamedTuple):
    """An answer that says how good it is.

    Attributes:
        value: The point found; always feasible, also without convergence.
        residual: How far the optimality conditions are violated, without unit; 0-dim.
        n_iter: Iterations spent.
        converged: Whether the residual is at most the solver's ``tol``; 0-dim, bool.
    """

    value: Tensor
    residual: Tensor
    n_iter: int
    converged: Tensor
