"""Inner products and combinations of rows, in a precision that can be trusted."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 2**20  # columns that are converted at a time
PIECE = 2**16  # columns of long rows that a CPU multiplies at a time: thin products are slow
TINY, HUGE = 1e-20, 1e30  # squared norms between which float32 products neither vanish nor overflow


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Compute in the precision of the tensors, also where a call stands in an autocast block."""

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        kinds = _device_types()
        if not any(map(torch.is_autocast_enabled, kinds)):
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for kind in filter(torch.is_autocast_enabled, kinds):
                stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return called


@cache
def _device_types() -> tuple[str, ...]:
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


def gram_matrix(rows: Tensor, *, scaled: bool = False) -> Tensor:
    """Compute the inner products of rows.

    Products are accumulated in at least float32, never in TF32, whatever the global flags say.

    Args:
        rows: Shape ``[m, n]``.
        scaled: First divide by the power of two next to the largest entry, so that nothing
            under- or overflows; costs one more read.

    Returns:
        Shape ``[m, m]``, float64, on the device of ``rows``.
    """
    if rows.is_complex():  # the inner product is the real part of the complex one
        rows = torch.view_as_real(rows).flatten(1)
    if not scaled and _is_plain(rows):
        cached = rows.device.type != "cpu" or rows.numel() <= CHUNK
        pieces = (rows,) if cached else torch.split(rows, PIECE, dim=1)
        total = (pieces[0] @ pieces[0].T).double()
        for piece in pieces[1:]:
            total += piece @ piece.T
        return total
    dtype = torch.float32 if rows.dtype in (torch.float16, torch.bfloat16) else rows.dtype
    if rows.is_cuda and torch.backends.cuda.matmul.allow_tf32:
        dtype = torch.float64
    total = rows.new_zeros((len(rows), len(rows)), dtype=torch.float64)
    exponent = torch.zeros((), dtype=torch.int32, device=rows.device)
    scaled = scaled and rows.numel() > 0
    if scaled:
        largest = torch.linalg.vector_norm(rows, float("inf"))
        exponent = torch.frexp(largest.double()).exponent
        one = torch.ones((), dtype=dtype, device=rows.device)
        halves = [torch.ldexp(one, -(exponent // 2)), torch.ldexp(one, exponent // 2 - exponent)]
    for chunk in torch.split(rows, CHUNK, dim=1):
        chunk = chunk.to(dtype)
        if scaled:
            chunk = (chunk * halves[0]).mul_(halves[1])
        total += (chunk @ chunk.T).double()
    return torch.ldexp(total, 2 * exponent)


def largest_entries(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the largest absolute entry of each tensor, shape ``[k]``, not finite if one entry is.

    Args:
        tensors: Any, sparse or dense; an empty one counts as zero.
        device: Where the result is wanted.
    """
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    dense = [t if t.numel() else t.new_zeros(1) for t in dense]
    sizes = torch._foreach_norm(dense, float("inf")) if dense else []
    return torch.stack([s.to(device) for s in sizes]) if sizes else torch.zeros(0, device=device)


def all_finite(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Say whether every entry of some tensors is finite, with one trip from the device."""
    return bool(largest_entries(list(tensors), device).isfinite().all())


def combine_tiny(rows: Tensor, weights: Tensor) -> Tensor:
    """Combine rows so small that their weights may be too large for their dtype."""
    exponent = (torch.frexp(weights.abs().amax()).exponent - 100).clamp(min=0)
    return torch.ldexp(combine(rows, torch.ldexp(weights, -exponent)), exponent)


def total_gram(rows: Sequence[Tensor], *, host: bool = False) -> Tensor:
    """Compute the inner products of rows that are spread over several tensors.

    Args:
        rows: Tensors of shape ``[m, *shape]``.
        host: Bring the matrix to the host; then protection against under- and overflow is taken
            only where it is needed, else always.

    Returns:
        Shape ``[m, m]``, float64.
    """
    device = torch.device("cpu") if host else rows[0].device
    if host:
        total = _sum_of_grams(rows, device, scaled=False)
        if not needs_scaling(total.diagonal().tolist()):
            return total
    return _sum_of_grams(rows, device, scaled=True)


def total_vector(parts: Sequence[Tensor], *, host: bool = False) -> Tensor:
    """Sum vectors of one shape in float64, brought to the host if asked for."""
    device = torch.device("cpu") if host else parts[0].device
    moved = [part.to(device, torch.float64) for part in parts]
    return moved[0] if len(moved) == 1 else torch.stack(moved).sum(dim=0)


def _sum_of_grams(rows: Sequence[Tensor], device: torch.device, *, scaled: bool) -> Tensor:
    grams = [gram_matrix(row.flatten(1), scaled=scaled).to(device) for row in rows]
    return grams[0] if len(grams) == 1 else torch.stack(grams).sum(dim=0)


def needs_scaling(squares: Sequence[float]) -> bool:
    """Say whether some squared norm may have vanished or overflowed in float32."""
    return not (min(squares) > TINY and sum(squares) < HUGE)  # a sum with NaN is not


def by_batch(gram: Tensor, n_batches: int) -> Tensor:
    """View inner products over the tasks of every batch in turn as ``[b, b, m, m]``."""
    m = gram.shape[0] // n_batches
    return gram.view(n_batches, m, n_batches, m).transpose(1, 2)


def sparse_gram(rows: Sequence[Tensor | None]) -> Tensor:
    """Compute the inner products of sparse rows; None counts as zero."""
    some = next(row for row in rows if row is not None)
    wide = [None if row is None else _widened(row) for row in rows]
    total = torch.zeros((len(rows), len(rows)), dtype=torch.float64, device=some.device)
    for i, a in enumerate(wide):
        for j, b in enumerate(wide[: i + 1]):
            if a is not None and b is not None:
                total[i, j] = total[j, i] = (a * b).sum()
    return total


def stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    """Stack rows, with zeros for those that are missing; None if all are."""
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    return torch.stack([torch.zeros_like(some) if row is None else row for row in rows])


def added(a: Tensor, b: Tensor) -> Tensor:
    """Add two gradients, of which either may be sparse; the sum of two kinds is dense."""
    return b + a if a.is_sparse and not b.is_sparse else a + b


def combine(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute the weighted sum of rows.

    Args:
        rows: Shape ``[m, n]``.
        weights: Shape ``[m]``, float64, on the device of ``rows``.
        out: Where to write, shape ``[n]``; None for a new tensor.
    """
    if _is_plain(rows):
        return torch.mv(rows.T, weights.to(rows.dtype), out=out)
    if out is None:
        out = rows.new_empty(rows.shape[1])
    if rows.is_complex():
        combine(torch.view_as_real(rows).flatten(1), weights, torch.view_as_real(out).flatten())
        return out
    for chunk, part in zip(torch.split(rows, CHUNK, dim=1), torch.split(out, CHUNK), strict=True):
        part.copy_(torch.mv(chunk.float().T, weights.float()))
    return out


def wide(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor, or float32 if that is wider: for sums over many steps."""
    return torch.promote_types(tensor.dtype, torch.float32)


def times(rows: Sequence[Tensor], factors: Tensor) -> list[Tensor]:
    """Multiply row i of every tensor by factor i, in at least float32.

    Args:
        rows: Tensors of shape ``[m, *shape]``.
        factors: Shape ``[m]``.
    """
    return [
        row.to(wide(row)) * factors.to(row.device, wide(row)).view(-1, *[1] * (row.ndim - 1))
        for row in rows
    ]


def combined(weights: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the weighted sum of rows that are spread over several tensors.

    Args:
        weights: Shape ``[m]``.
        rows: Tensors of shape ``[m, *shape]``; their sums have shape ``[*shape]``.
    """
    return [combine(row.flatten(1), weights.to(row.device)).view(row.shape[1:]) for row in rows]


def _is_plain(rows: Tensor) -> bool:
    if rows.dtype == torch.float64:
        return True
    tf32 = rows.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return rows.dtype == torch.float32 and not tf32


def _widened(row: Tensor) -> Tensor:
    return row.coalesce().double() if row.is_sparse else row.double()
