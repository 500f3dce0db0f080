"""The eigensolver that never leaves the device, and the combination of equal projections."""

import pytest
import torch
from torch import Tensor

from gradbal.solvers import equal_projection, equilibrate, symmetric_eigen

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
