"""Task gradients of one parameter that are not formed, and their inner products."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal.jacobian.layers import Layer, Lookup, Outer, Use
from gradbal.solvers.gram import gram_matrix


@dataclass(frozen=True, eq=False)
class Product:
    """A task's gradient of one parameter, not formed: stands where a tensor would.

    Attributes:
        layer: The parameter and its uses.
        cotangents: One at the output of each use; None where the task does not pass. All have a
            leading axis if several tasks went down together.
    """

    layer: Layer
    cotangents: Sequence[Tensor | None]
    is_sparse = False

    def __getitem__(self, task: int) -> "Product":
        """Return the gradient of one task out of several."""
        return Product(self.layer, [c if c is None else c[task] for c in self.cotangents])

    def to_dense(self) -> Tensor:
        """Form the gradient."""
        return self.layer.gradient(self.cotangents)


def product_gram(rows: Sequence[Product | None], *, scaled: bool = False) -> Tensor:
    r"""Compute the inner products of gradients :math:`G_k^\top X` of one parameter, in float64.

    They are :math:`\langle G_i, X X^\top G_j \rangle`. What cancels between samples in a gradient
    cancels here to the square, for which float64 has digits enough. With a sketch S of the layer
    they are those of :math:`G_k^\top X S`, which is right on average.

    Args:
        rows: One per task; None counts as zero. Their uses go together.
        scaled: Protect float64 rows against under- and overflow.

    Returns:
        Shape ``[m, m]``, float64.
    """
    layers = dict.fromkeys(row.layer for row in rows if row is not None)
    uses = [use for layer in layers for use in layer.uses]
    factors = _factors(rows, uses)
    looked_up = [use.saved for use in uses if isinstance(use, Lookup)]
    if looked_up:
        summed = _by_index(torch.cat(looked_up), factors, uses[0].sizes.b)
        return gram_matrix(summed.flatten(1), scaled=scaled)
    outer, sketch = [use for use in uses if isinstance(use, Outer)], next(iter(layers)).sketch
    if sketch is not None:
        matrix = sketch.matrix(outer[0].sizes.b, factors)
        parts = [use.projected(matrix).to(factors) for use in outer]
        small = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return gram_matrix((small.mT @ factors).flatten(1), scaled=scaled)
    inputs = [use.inputs().double() for use in outer]
    whole = inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=1)
    square = whole @ whole.mT
    gram = factors.flatten(1) @ (square @ factors).flatten(1).T
    return (gram + gram.T) / 2


def _factors(rows: Sequence[Product | None], uses: Sequence[Use]) -> Tensor:
    """Lay out the tasks' factors for all uses, ``[m, members, rows, a]``, float64."""
    starts, count = {}, 0
    for use in uses:
        starts[use] = count
        count += use.sizes.rows
    members, _, a, _ = uses[0].sizes
    some = next(c for row in rows if row is not None for c in row.cotangents if c is not None)
    factors = some.new_zeros((len(rows), members, count, a), dtype=torch.float64)
    for row, factor in zip(rows, factors, strict=True):
        for use, cotangent in zip(row.layer.uses, row.cotangents, strict=True) if row else ():
            if cotangent is not None:
                start = starts[use]
                factor[:, start : start + use.sizes.rows] = use.factor(cotangent)
    return factors


def _by_index(indices: Tensor, factors: Tensor, count: int) -> Tensor:
    """Sum what has one of ``count`` indices, in the place of one of them; others stay zero."""
    places = indices.new_empty(count)
    places[indices] = torch.arange(len(indices), device=indices.device)
    return torch.zeros_like(factors).index_add_(2, places[indices], factors)
