"""The law of Aligned-MTL: the aligned rows are orthogonal and equally long."""

from collections.abc import Callable

import pytest
import torch
from cases import J3, JR, conflicting, correlated, decades, normal, rank_deficient, rows
from hypothesis import given, settings, strategies
from torch import Tensor

from gradbal import aggregate, make_rule

FAMILIES: dict[str, Callable[[int], Tensor]] = {
    "any": lambda m: normal(m, 4 * m + 8, seed=m),
    "conflicting": lambda m: conflicting(m, seed=m),
    "correlated": lambda m: correlated(m, seed=m),
    "six decades": lambda m: decades(m, seed=m),
    "dependent": lambda m: rank_deficient(m, (m + 1) // 2, seed=m),
}
MODES = {
    "min": lambda values: values[0],
    "median": lambda values: values[(len(values) - 1) // 2],
    "rmse": lambda values: values.mean(),
}


def transform(jacobian: Tensor, **options: object) -> Tensor:
    """Return the matrix whose product with the Jacobian holds the aligned rows."""
    columns = []
    for one_hot in torch.eye(len(jacobian)).tolist():
        rule = make_rule("aligned_mtl", preferences=tuple(one_hot), **options)
        columns.append(aggregate(jacobian, rule).weights)
    return torch.stack([column for column in columns if column is not None], dim=1)


@settings(max_examples=30)
@given(
    family=strategies.sampled_from(sorted(FAMILIES)),
    m=strategies.integers(2, 16),
    exponent=strategies.floats(-12, 12),
    mode=strategies.sampled_from(sorted(MODES)),
)
def test_rows_are_aligned(family: str, m: int, exponent: float, mode: str) -> None:
    jacobian, scale = FAMILIES[family](m), 10**exponent
    rank = (m + 1) // 2 if family == "dependent" else m
    singular = torch.linalg.svdvals(jacobian)[:rank].flip(0)
    length = scale * MODES[mode](singular.square()).sqrt()
    matrix = transform(scale * jacobian, scale_mode=mode)
    norms = jacobian.norm(dim=1)
    balanced = norms[:, None] * matrix
    assert (balanced - (norms * matrix).T).abs().max() <= 1e-9 * balanced.abs().max()
    aligned = matrix @ (scale * jacobian) / length
    back = aligned @ aligned.T @ aligned  # a projection, and the identity at full rank
    torch.testing.assert_close(back, aligned, rtol=0, atol=1e-8)
    assert abs(aligned.square().sum() - rank) <= 1e-7


def test_longer_rows_in_every_mode() -> None:
    lengths = [
        aggregate(rows(J3), make_rule("aligned_mtl", scale_mode=mode)).direction.norm()
        for mode in MODES
    ]
    assert lengths == sorted(lengths)
    assert abs(lengths[0] ** 2 - 3 * 3.916120) <= 1e-5


def test_the_sum_of_rows_that_are_aligned_already() -> None:
    weights = aggregate(3 * rows([[1, 0, 0], [0, 0, 1], [0, -1, 0]]), "aligned_mtl").weights
    torch.testing.assert_close(weights, torch.ones(3, dtype=torch.float64))


def test_preferences_weigh_the_aligned_rows() -> None:
    matrix = transform(rows(JR))
    weights = aggregate(rows(JR), make_rule("aligned_mtl", preferences=(2.0, 0.0, 1.0))).weights
    torch.testing.assert_close(weights, matrix @ torch.tensor([2.0, 0, 1], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_short_gradient_counts(dtype: torch.dtype) -> None:
    jacobian = torch.tensor([[1, 0], [0, 1e-5]], dtype=dtype)
    direction = aggregate(jacobian, "aligned_mtl").direction
    torch.testing.assert_close(direction, torch.full((2,), 1e-5, dtype=dtype))


def test_nearly_parallel_rows_collapse_unless_a_tolerance_says_otherwise() -> None:
    jacobian = rows([[1, 0], [1, 1e-4]])
    assert aggregate(jacobian, "aligned_mtl").direction.norm() <= 2e-4
    coarse = aggregate(jacobian, make_rule("aligned_mtl", tol=1e-6)).direction
    torch.testing.assert_close(coarse, rows([[2, 1e-4]])[0], rtol=0, atol=1e-6)
    halves = jacobian.float() * torch.tensor([[1, 1], [1, 1e-3]])
    direction = aggregate(halves, "aligned_mtl").direction  # beyond what float32 can tell
    torch.testing.assert_close(direction, torch.tensor([2, 0.0]), rtol=0, atol=1e-4)
