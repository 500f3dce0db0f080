"""Inner products and combinations on CUDA in one read of the rows, as Triton kernels.

Before the first use on a card they are compared with plain operations there. Measured on an H200
with prototypes (rows of 1 GB and more): inner products of 2 to 8 float32 rows reach 1.7 to 2.7
TB/s, where float64 products of converted pieces reach 0.14 to 0.4; combinations reach 2.5 to 3.7
TB/s, where ``torch.mv`` reaches 0.7 to 2.6.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE, WIDTH = 8, 128  # rows and columns of a block; float64 accumulators fill the registers
PROGRAMS = 1056  # eight for each multiprocessor of a large card
COLUMNS = 1024  # of a combination, for each program


@triton.jit  # type: ignore[untyped-decorator]
def _gram_kernel(
    rows: Any,
    partial: Any,
    m: Any,
    n: Any,
    stride: Any,
    tiles: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
) -> None:
    """Sum the products of two tiles of rows over every so many blocks of columns."""
    program, a, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if a <= b:
        i, j = a * T + tl.arange(0, T), b * T + tl.arange(0, T)
        total = tl.zeros((T, T, W), dtype=tl.float64)
        for block in range(program, tl.cdiv(n, W), tl.num_programs(0)):
            column = tl.cast(block, tl.int64) * W + tl.arange(0, W)
            there = column[None, :] < n
            left = tl.load(
                rows + i[:, None].to(tl.int64) * stride + column[None, :],
                mask=there & (i[:, None] < m),
                other=0.0,
            ).to(tl.float64)
            right = left
            if tiles > 1:
                right = tl.load(
                    rows + j[:, None].to(tl.int64) * stride + column[None, :],
                    mask=there & (j[:, None] < m),
                    other=0.0,
                ).to(tl.float64)
            total += left[:, None, :] * right[None, :, :]
        found = tl.sum(total, axis=2)
        inside = (i[:, None] < m) & (j[None, :] < m)
        start = partial + program * m * m
        tl.store(start + i[:, None] * m + j[None, :], found, mask=inside)
        if a < b:
            tl.store(start + j[None, :] * m + i[:, None], found, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(
    rows: Any, weights: Any, out: Any, m: Any, n: Any, stride: Any, W: tl.constexpr
) -> None:
    """Sum weighted rows over one block of columns, in float64."""
    column = tl.program_id(0).to(tl.int64) * W + tl.arange(0, W)
    total = tl.zeros((W,), dtype=tl.float64)
    for i in range(m):
        row = tl.load(rows + tl.cast(i, tl.int64) * stride + column, mask=column < n, other=0.0)
        total += row.to(tl.float64) * tl.load(weights + i)
    if out.dtype.element_ty != tl.float64:  # not every release converts it to bfloat16
        total = total.to(tl.float32)
    tl.store(out + column, total.to(out.dtype.element_ty), mask=column < n)


def gram(rows: Tensor) -> Tensor:
    """Compute the inner products of rows on a card, ``[m, m]``, float64.

    Args:
        rows: Shape ``[m, n]``, real, contiguous along ``n``.
    """
    m, n = rows.shape
    tile = min(TILE, triton.next_power_of_2(m))
    tiles = triton.cdiv(m, tile)
    programs = max(1, min(PROGRAMS // tiles, triton.cdiv(n, WIDTH)))
    partial = torch.empty((programs, m, m), dtype=torch.float64, device=rows.device)
    with torch.cuda.device(rows.device):
        _gram_kernel[programs, tiles, tiles](
            rows, partial, m, n, rows.stride(0), tiles=tiles, T=tile, W=WIDTH, num_warps=4
        )
    return partial.sum(dim=0)


def combine(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """Write the weighted sum of rows on a card, accumulated in float64.

    Args:
        rows: Shape ``[m, n]``, real, contiguous along ``n``.
        weights: Shape ``[m]``, float64.
        out: Shape ``[n]``, contiguous.
    """
    m, n = rows.shape
    with torch.cuda.device(rows.device):
        _combine_kernel[(triton.cdiv(n, COLUMNS),)](
            rows, weights.to(rows.device, torch.float64), out, m, n, rows.stride(0), W=COLUMNS
        )


def agree(device: torch.device) -> bool:
    """Say whether both kernels give on this card what plain operations give."""
    for m in (3, TILE + 1):
        rows = torch.arange(m * 1000.0, device=device).sin_().view(m, 1000)
        weights = torch.arange(m, dtype=torch.float64, device=device)
        wide, found = rows.double(), torch.empty_like(rows[0])
        combine(rows, weights, found)
        if not torch.allclose(gram(rows), wide @ wide.T, rtol=1e-12, atol=1e-9):
            return False
        if not torch.allclose(found.double(), weights @ wide, rtol=1e-5, atol=1e-4):
            return False
    return True
