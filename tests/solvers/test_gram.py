"""Inner products and combinations of rows that are taken in chunks of columns."""

from importlib import import_module
from math import fsum

import pytest
import torch
from torch import Tensor

from gradbal import aggregate
from gradbal._utils.torch_private import reduces_float32
from gradbal.solvers.gram import ROUNDING, combine, gram_matrix

MODULE = import_module("gradbal.solvers.gram")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHUNK", 4)
    monkeypatch.setattr(MODULE, "PIECE", 3)


def draw(m: int, n: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(10 * m + n)
    kind = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(m, n, generator=generator, dtype=kind).to(dtype)


def precise(rows: Tensor) -> Tensor:
    """Return rows of real numbers in float64."""
    return torch.view_as_real(rows).flatten(1).double() if rows.is_complex() else rows.double()


@pytest.mark.parametrize("n", [1, 4, 10])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram_matrix_is_one_product(dtype: torch.dtype, scaled: bool, n: int) -> None:
    rows = draw(5, n, dtype)
    found = gram_matrix(rows, scaled=scaled)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, precise(rows) @ precise(rows).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 4, 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combination_is_one_product(dtype: torch.dtype, n: int) -> None:
    rows, weights = draw(5, n, dtype), torch.linspace(-1, 2, 5, dtype=torch.float64)
    found = combine(rows, weights)
    assert found.dtype == dtype
    out = torch.full_like(found, torch.nan)
    combine(rows, weights, out)
    assert torch.equal(out, found)
    wanted = weights @ precise(rows)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(precise(found[None])[0], wanted, rtol=2 * eps, atol=20 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1_000, 300_000])
def test_inner_products_of_narrow_rows_are_exact(
    dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rows = draw(3, n, dtype) + 0.5
    rows = torch.cat([rows, (rows[:1] - rows[1:2])])
    found, wide = gram_matrix(rows), rows.double()
    exact = [[fsum((a * b).tolist()) for b in wide] for a in wide]  # products are exact
    norms = wide.norm(dim=1)
    error = (found - torch.tensor(exact, dtype=found.dtype)).abs() / (norms[:, None] * norms)
    assert error.max() <= ROUNDING


@pytest.mark.parametrize("rule", ["aligned_mtl", "config", "imtl_g"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_direction_vanishes_in_long_dependent_rows(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of the Gram matrix stays below what counts as zero, however long the rows."""
    monkeypatch.undo()
    for n in (65_536, 262_144):
        for seed in range(3):
            some = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).to(dtype)
            found = aggregate(torch.cat([some, some.sum(0, keepdim=True)]), rule)
            assert found.direction.norm() >= 0.5 * n**0.5


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one switch"
)
def test_the_newer_switch_for_tf32_is_read() -> None:
    """After it is set the older one raises."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    assert not reduces_float32(torch.device("cuda"))
    switch.fp32_precision = "tf32"
    try:
        assert reduces_float32(torch.device("cuda"))
        assert not reduces_float32(torch.device("cpu"))
        rows = draw(3, 10, torch.float32)
        gram_matrix(rows)
        combine(rows, torch.ones(3).double())
    finally:
        switch.fp32_precision = before
