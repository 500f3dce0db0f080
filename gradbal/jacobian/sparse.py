"""Rows of one parameter kept apart from the blocks: sparse, or products that are not formed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal._utils.devices import on_device
from gradbal.jacobian.unformed import Product, product_gram
from gradbal.solvers.gram import added, sparse_gram

Row = Tensor | Product | None


def gram_apart(rows: Sequence[Row], *, scaled: bool) -> Tensor:
    """Return the inner products of products or sparse rows; None counts as zero."""
    uses = [row.layer.uses[0] for row in rows if isinstance(row, Product)]
    if uses and all(uses[0].goes_with(use) for use in uses):
        products = [row for row in rows if row is None or isinstance(row, Product)]
        if len(products) == len(rows):
            return product_gram(products, scaled=scaled)
    return sparse_gram([row.to_dense() if isinstance(row, Product) else row for row in rows])


def weighted(rows: Sequence[Row], weights: Tensor) -> Tensor | None:
    """Sum the rows times their weights, sparse, dense or products, in at least float32."""
    layer = next((row.layer for row in rows if isinstance(row, Product)), None)
    if layer is not None:
        nothing = [None] * len(layer.uses)
        each = [row.cotangents if isinstance(row, Product) else nothing for row in rows]
        return layer.gradient([weighted(c, weights) for c in zip(*each, strict=True)])
    total, dtype = None, torch.float32
    some = next((row for row in rows if isinstance(row, Tensor)), None)
    weights = weights if some is None else on_device(weights, some.device)
    for row, weight in zip(rows, weights, strict=True):
        if isinstance(row, Tensor):
            dtype = row.dtype
            wide = torch.promote_types(dtype, torch.float32)
            term = row.to(wide) * weight.to(wide)
            total = term if total is None else added(total, term)
    return None if total is None else total.to(dtype)


def formed(row: Tensor | Product) -> Tensor:
    """Return a row as a dense tensor."""
    return row.to_dense() if isinstance(row, Product) or row.is_sparse else row


def summed(grams: Sequence[Tensor]) -> Tensor:
    """Add inner products that were found in different places."""
    total = grams[0]
    for gram in grams[1:]:
        total = total + gram.to(total.device)
    return total
