"""Inner products and combinations of rows, exact to float64 rounding."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache, wraps
from importlib import import_module
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from gradbal._utils.devices import on_device
from gradbal._utils.log import log
from gradbal._utils.torch_private import reduces_float32

P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 2**20  # columns that are converted at a time
PIECE = 2**17  # entries that a CPU converts at a time: they stay in its cache
ROUNDING = 2.0**-45  # relative error of inner products, from float64 sums of 10^5 terms
ROW_NOISE = 6  # relative error of a task gradient, in units of roundoff of the narrowest dtype
_KERNELS: dict[torch.device, ModuleType | None] = {}  # by card
TINY, HUGE = 1e-280, 1e300  # squared norms between which no square vanishes or overflows


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
    """Compute the inner products of rows, exact to float64 rounding.

    Products of float16, bfloat16 and float32 numbers are exact in float64 and are summed in
    float64, in pieces. No switch of torch (TF32, reduced precision) changes the result.

    Args:
        rows: Shape ``[m, n]``.
        scaled: First divide float64 rows by the power of two next to the largest entry, so that
            no square under- or overflows; costs one more read. Squares of narrower numbers are
            always within the range of float64.

    Returns:
        Shape ``[m, m]``, float64, on the device of ``rows``.
    """
    if rows.is_complex():  # the inner product is the real part of the complex one
        rows = torch.view_as_real(rows).flatten(1)
    if not scaled or rows.dtype != torch.float64 or not rows.numel():
        return _gram(rows)
    largest = torch.linalg.vector_norm(rows, float("inf"))
    exponent = torch.frexp(largest).exponent
    one = torch.ones_like(largest)
    halves = torch.ldexp(one, -(exponent // 2)), torch.ldexp(one, exponent // 2 - exponent)
    pieces = torch.split(rows, CHUNK, dim=1)
    total = sum(_gram((piece * halves[0]).mul_(halves[1])) for piece in pieces)
    return torch.ldexp(torch.as_tensor(total), 2 * exponent)


def _gram(rows: Tensor) -> Tensor:
    """Compute the same for real rows, in pieces that stay in a cache or fill a card."""
    if (kernels := fused(rows)) is not None:
        found: Tensor = kernels.gram(rows)
        return found
    m, n = rows.shape
    width = max(PIECE // max(m, 1), 1024) if rows.device.type == "cpu" else 4 * CHUNK
    pieces = (rows,) if n <= width else torch.split(rows, width, dim=1)
    total = _square(pieces[0])
    for piece in pieces[1:]:
        total += _square(piece)
    return total


def _square(rows: Tensor) -> Tensor:
    wide = rows.double()
    return wide @ wide.T


def fused(rows: Tensor) -> ModuleType | None:
    """Return the kernels for rows on a CUDA card, or None where plain operations are to be used.

    That is on other devices, without Triton, for subclasses of tensors, while torch.compile traces,
    and where the kernels do not agree with plain operations on this card.
    """
    if rows.device.type != "cuda" or type(rows) is not Tensor or rows.stride(-1) != 1:
        return None
    if torch.compiler.is_compiling():
        return None
    if rows.device not in _KERNELS:
        if torch.cuda.is_current_stream_capturing():  # to compare them would wait for the card
            return None
        _KERNELS[rows.device] = _kernels_that_agree(rows.device)
    return _KERNELS[rows.device]


def _kernels_that_agree(device: torch.device) -> ModuleType | None:
    try:
        kernels = import_module("gradbal.solvers.kernels")
    except ImportError:
        return None
    try:
        agree = kernels.agree(device)
    except Exception as error:  # whatever a compiler may raise
        log.warning("Triton's kernels fail on %s, plain operations are used: %s", device, error)
        return None
    return kernels if agree else None


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
    if host:
        total = _sum_of_grams(rows, scaled=False).cpu()
        narrow = all(row.dtype != torch.float64 for row in rows)
        if narrow or not needs_scaling(total.diagonal().tolist()):
            return total
    total = _sum_of_grams(rows, scaled=True)
    return total.cpu() if host else total


def total_vector(parts: Sequence[Tensor], *, host: bool = False) -> Tensor:
    """Sum vectors of one shape in float64, brought to the host if asked for."""
    total = _summed([part.double() for part in parts])
    return total.cpu() if host else total


def _sum_of_grams(rows: Sequence[Tensor], *, scaled: bool) -> Tensor:
    return _summed([gram_matrix(row.reshape(len(row), -1), scaled=scaled) for row in rows])


def _summed(parts: Sequence[Tensor]) -> Tensor:
    """Sum tensors of one shape on the device of the first."""
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(dim=0)


def needs_scaling(squares: Sequence[float]) -> bool:
    """Say whether a square in a sum of float64 squares may have vanished or overflowed."""
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


def combine(
    rows: Tensor, weights: Tensor, out: Tensor | None = None, *, precise: bool = False
) -> Tensor:
    """Compute the weighted sum of rows.

    Args:
        rows: Shape ``[m, n]``.
        weights: Shape ``[m]``, float64, on the device of ``rows``.
        out: Where to write, shape ``[n]``; None for a new tensor.
        precise: Sum in float64, for weights so large that nearly all cancels.
    """
    if out is None:
        out = rows.new_empty(rows.shape[1])
    if rows.is_complex():
        combine(torch.view_as_real(rows).flatten(1), weights, torch.view_as_real(out).flatten())
        return out
    if (kernels := fused(rows)) is not None:
        kernels.combine(rows, weights, out)
        return out
    single = rows.dtype == torch.float32 and not precise
    if rows.dtype == torch.float64 or (single and not reduces_float32(rows.device)):
        return torch.mv(rows.T, weights.to(rows.dtype), out=out)
    dtype = torch.float64 if precise or rows.dtype == torch.float32 else torch.float32
    for chunk, part in zip(torch.split(rows, CHUNK, dim=1), torch.split(out, CHUNK), strict=True):
        part.copy_(torch.mv(chunk.to(dtype).T, weights.to(dtype)))
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
    found = []
    for row in rows:
        factors = on_device(factors, row.device)
        found.append(row.to(wide(row)) * factors.to(wide(row)).view(-1, *[1] * (row.ndim - 1)))
    return found


def combined(weights: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """Return the weighted sum of rows that are spread over several tensors.

    Args:
        weights: Shape ``[m]``.
        rows: Tensors of shape ``[m, *shape]``; their sums have shape ``[*shape]``.
    """
    found = []
    for row in rows:
        weights = on_device(weights, row.device)
        found.append(combine(row.reshape(len(row), -1), weights).view(row.shape[1:]))
    return found


def _widened(row: Tensor) -> Tensor:
    return row.coalesce().double() if row.is_sparse else row.double()
