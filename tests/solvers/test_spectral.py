"""The eigensolver that never leaves the device, and the combination of equal projections."""

import math

import mpmath
import pytest
import torch
from torch import Tensor

from gradbal.solvers import equal_projection, equilibrate, gram_eigen, symmetric_eigen

SIZES = (1, 2, 3, 5, 8, 16, 33)
EPS = torch.finfo(torch.float64).eps


def rows(m: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("m", SIZES)
def test_eigenvectors_diagonalise(m: int, capturable: bool) -> None:
    jac = rows(m, max(1, m // 2), seed=m)
    matrix = jac @ jac.T
    values, vectors = symmetric_eigen(matrix, capturable=capturable)
    size = matrix.norm()
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(m, dtype=torch.float64))
    assert (vectors * values @ vectors.T - matrix).norm() <= 1e-12 * size
    expected = torch.linalg.eigvalsh(matrix)
    assert (values.sort().values - expected).abs().max() <= 1e-12 * size


def test_equal_and_diagonal_matrices_are_left_as_they_are() -> None:
    matrix = torch.diag(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64))
    values, vectors = symmetric_eigen(matrix, capturable=True)
    torch.testing.assert_close(values, matrix.diagonal())
    torch.testing.assert_close(vectors, torch.eye(3, dtype=torch.float64))


def spread(jac: Tensor, decades: float, seed: int) -> Tensor:
    """Give the rows lengths that lie some decades apart, in no order; powers of two are exact."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(-decades / 2, decades / 2, len(jac), dtype=torch.float64)
    order = torch.randperm(len(jac), generator=generator)
    return jac * 2.0 ** (lengths[order] / math.log10(2)).round()[:, None]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("decades", [0, 3, 6, 8, 12])
@pytest.mark.parametrize("m", [1, 2, 3, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_small_eigenvalues_are_as_precise_as_large_ones(
    m: int, decades: float, capturable: bool
) -> None:
    for scale in (1e-12, 1.0, 1e12):
        jac = scale * spread(rows(m, 4 * m, seed=m), decades, seed=m)
        values, vectors = gram_eigen(jac @ jac.T, tol=m * EPS, capturable=capturable)
        aligned = (vectors * values.rsqrt()) @ vectors.T @ jac  # the rows of a rotation
        torch.testing.assert_close(
            aligned @ aligned.T, torch.eye(m, dtype=torch.float64), rtol=0, atol=1e-9
        )
        digits = mpmath.matrix(jac.tolist())
        with mpmath.workdps(60):
            exact = sorted(float(value) for value in mpmath.eigsy(digits * digits.T)[0])
        torch.testing.assert_close(values.sort().values.tolist(), exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("decades", [0, 6, 12])
@pytest.mark.parametrize(("m", "rank"), [(2, 1), (3, 2), (8, 4), (16, 5)])
def test_the_rank_does_not_depend_on_lengths(
    m: int, rank: int, decades: float, capturable: bool
) -> None:
    jac = (rows(m, rank, seed=m) * 4).round() @ (rows(rank, 2 * m, seed=rank) * 4).round()
    jac = spread(jac, decades, seed=m)
    values, vectors = gram_eigen(jac @ jac.T, tol=m * EPS, capturable=capturable)
    assert (values > 0).sum() == rank
    assert (values == 0).sum() == m - rank
    vectors, values = vectors[:, values > 0], values[values > 0]
    aligned = (vectors * values.rsqrt()) @ vectors.T @ jac
    torch.testing.assert_close(aligned @ aligned.T @ aligned, aligned, rtol=0, atol=1e-9)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_coarse_tolerance_holds_for_well_conditioned_matrices_too(capturable: bool) -> None:
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    values, _ = gram_eigen(gram, tol=0.1, capturable=capturable)
    torch.testing.assert_close(values.sort().values, torch.tensor([0.0, 1.9]).double())
    values, _ = gram_eigen(gram, tol=0.01, capturable=capturable)
    torch.testing.assert_close(values.sort().values, torch.tensor([0.1, 1.9]).double())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("table", [[[0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 5.0]]])
def test_rows_of_zeros_have_eigenvalues_of_zero(table: list[list[float]], capturable: bool) -> None:
    gram = torch.tensor(table, dtype=torch.float64)
    values, vectors = gram_eigen(gram, tol=EPS, capturable=capturable)
    torch.testing.assert_close(values.sort().values, gram.diagonal())
    assert vectors.isfinite().all()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("m", [2, 3, 8, 16])
def test_projections_are_equal(m: int, scale: float, capturable: bool) -> None:
    jac = rows(m, 200, seed=m) * torch.logspace(-3, 3, m, dtype=torch.float64)[:, None] * scale
    gram = jac @ jac.T
    weights = equal_projection(gram, eps=EPS, capturable=capturable)
    projections = gram @ weights / gram.diagonal().sqrt()
    assert weights.sum().item() == pytest.approx(1)
    assert (projections - projections.mean()).abs().max() <= 1e-8 * projections.mean()


@pytest.mark.parametrize("capturable", [False, True])
def test_an_uphill_solution_is_replaced_by_the_min_norm_point_of_the_directions(
    capturable: bool,
) -> None:
    found = 0
    for seed in range(300):
        jac = rows(3, 3, seed) + 1.5 * rows(1, 3, seed + 1000)
        jac = jac * torch.tensor([1.0, 0.1, 10.0], dtype=torch.float64)[:, None]
        gram = jac @ jac.T
        norms = gram.diagonal().sqrt()
        plain = torch.linalg.solve(gram, norms)
        if plain.sum() >= -1e-6 * plain.abs().sum():
            continue
        found += 1
        weights = equal_projection(gram, eps=EPS, capturable=capturable)
        assert weights.sum().item() == pytest.approx(1)
        assert (weights >= -1e-12).all()
        shares = weights * norms / (weights * norms).sum()
        cosines, _ = equilibrate(gram)
        slope = cosines @ shares  # optimality of the min-norm point over unit vectors
        assert (slope >= shares @ slope - 1e-9).all()
    assert found > 0


@pytest.mark.parametrize("capturable", [False, True])
def test_a_deficient_matrix_gets_its_pseudo_inverse(capturable: bool) -> None:
    jac = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    gram = jac @ jac.T
    expected = torch.linalg.pinv(gram, hermitian=True) @ gram.diagonal().sqrt()
    weights = equal_projection(gram, eps=EPS, capturable=capturable)
    torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize(
    ("jac", "direction"),
    [
        ([[0.0, 0.0], [1.0, 2.0]], [1.0, 2.0]),
        ([[1.0, 2.0]] * 3, [1.0, 2.0]),
        ([[1.0, 2.0], [-1.0, -2.0]], [0.0, 0.0]),
        ([[3.0, 4.0]], [3.0, 4.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_conventions(jac: list[list[float]], direction: list[float], capturable: bool) -> None:
    matrix = torch.tensor(jac, dtype=torch.float64)
    weights = equal_projection(matrix @ matrix.T, eps=EPS, capturable=capturable)
    expected = torch.tensor(direction, dtype=torch.float64)
    torch.testing.assert_close(weights @ matrix, expected, rtol=1e-9, atol=1e-12)
