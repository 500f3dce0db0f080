"""EDM beside IMTL-G: the same where both are defined, and never uphill."""

import pytest
import torch
from cases import correlated, decades, normal, rows, seeded

from gradbal import aggregate


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 16, 40])
def test_same_as_imtl_g_where_all_have_weight(m: int, scale: float) -> None:
    jacobian = scale * 10 ** torch.linspace(-3, 3, m).double()[:, None] * normal(m, 50 * m, seed=m)
    result, theirs = aggregate(jacobian, "edm"), aggregate(jacobian, "imtl_g")
    assert result.weights is not None
    assert (result.weights > 0).all()
    torch.testing.assert_close(result.weights, theirs.weights, rtol=1e-8, atol=0)


def test_never_uphill_where_equal_projections_are() -> None:
    uphill = 0
    for seed in range(60):
        norms = 10 ** (2 * torch.rand(3, 1, generator=seeded(seed), dtype=torch.float64) - 1)
        jacobian = norms * torch.nn.functional.normalize(normal(3, 4, seed=seed), dim=1)
        raw = torch.linalg.solve(jacobian @ jacobian.T, norms[:, 0])
        uphill += bool(raw.sum() < 0)
        result = aggregate(jacobian, "edm")
        assert (jacobian @ result.direction > 0).all()
        assert result.weights is not None
        assert (result.weights >= 0).all()
    assert uphill > 0


@pytest.mark.parametrize("m", [2, 3, 8])
def test_a_smaller_angle_with_tasks_without_weight(m: int) -> None:
    jacobian = correlated(m, seed=m) * decades(m, seed=m).norm(dim=1)[:, None]
    result = aggregate(jacobian, "edm")
    assert result.weights is not None
    cosines = jacobian @ result.direction / jacobian.norm(dim=1) / result.direction.norm()
    least = cosines.min()
    assert (cosines[result.weights > 0] <= least * (1 + 1e-9)).all()


@pytest.mark.parametrize("m", [2, 3])
def test_parallel_gradients_share_their_weight_evenly(m: int) -> None:
    lengths = torch.arange(1.0, m + 1).double()
    weights = aggregate(lengths[:, None] * rows([[1, 2]]), "edm").weights
    torch.testing.assert_close(weights, (1 / lengths) / (1 / lengths).sum())


def test_a_zero_gradient_stops_nobody() -> None:
    present = normal(3, 5, seed=1)
    jacobian = torch.cat((present, torch.zeros(2, 5, dtype=torch.float64)))
    result = aggregate(jacobian, "edm")
    torch.testing.assert_close(result.direction, aggregate(present, "edm").direction)
    assert result.weights is not None
    assert result.weights[3:].tolist() == [0, 0]
