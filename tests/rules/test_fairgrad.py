"""The law of FairGrad: fair in the sense of alpha, whatever alpha."""

import pytest
import reference
import torch
from cases import J3, conflicting, correlated, decades, normal, rows, seeded

from gradbal import aggregate, make_rule

ALPHAS = [0.5, 1.0, 2.0, 5.0, 10.0]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 40])
def test_equations(m: int, alpha: float, scale: float) -> None:
    families = [normal(m, 2 * m, seed=m), correlated(m, seed=m), decades(m, seed=m)]
    if m > 1:
        families.append(conflicting(m, seed=m))
    for jacobian in families:
        weights = aggregate(scale * jacobian, make_rule("fairgrad", alpha=alpha)).weights
        assert weights is not None
        assert (weights > 0).all()
        assert reference.nash_residual(scale * jacobian, weights, alpha) <= 1e-8


@pytest.mark.parametrize("alpha", ALPHAS)
def test_lengths(alpha: float) -> None:
    rule = make_rule("fairgrad", alpha=alpha)
    result = aggregate(rows(J3), rule)
    assert result.weights is not None
    square = (result.weights ** (1 - 1 / alpha)).sum()
    torch.testing.assert_close(result.direction @ result.direction, square)
    for size in (1e-9, 1e9):
        scaled = aggregate(size * rows(J3), rule).direction
        power = (1 - alpha) / (1 + alpha)
        torch.testing.assert_close(scaled, size**power * result.direction, rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_no_direction_of_that_length_is_fairer(alpha: float) -> None:
    jacobian = normal(3, 6, seed=2)
    direction = aggregate(jacobian, make_rule("fairgrad", alpha=alpha)).direction

    def fairness(direction: torch.Tensor) -> float:
        gains = jacobian @ direction
        if (gains <= 0).any():
            return -torch.inf
        utility = gains.log() if alpha == 1 else gains ** (1 - alpha) / (1 - alpha)
        return utility.sum().item()

    best = fairness(direction)
    for seed in range(200):
        step = torch.randn(6, generator=seeded(seed), dtype=torch.float64)
        other = direction + 0.1 * direction.norm() * step / step.norm()
        assert fairness(other * direction.norm() / other.norm()) <= best


def test_alpha_one_is_nash_mtl() -> None:
    jacobian = decades(5, seed=3)
    ours = aggregate(jacobian, make_rule("fairgrad", alpha=1.0)).direction
    theirs = aggregate(jacobian, make_rule("nash_mtl", max_norm=None)).direction
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_large_alpha_serves_the_worst_task() -> None:
    direction = aggregate(rows(J3), make_rule("fairgrad", alpha=50.0)).direction
    shortest = aggregate(rows(J3), "mgda").direction
    assert torch.cosine_similarity(direction, shortest, dim=0) > 0.999
