import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradbal.solvers import project_simplex


@settings(derandomize=True, deadline=None, max_examples=60)
@given(m=st.integers(1, 40), exponent=st.integers(-12, 12), seed=st.integers(0, 999))
def test_nearest_point(m: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    point = torch.randn(m, generator=generator, dtype=torch.float64) * 10.0**exponent
    found = project_simplex(point)
    assert (found >= 0).all()
    assert abs(found.sum() - 1) <= 1e-14
    gap = point - found  # the same where there is weight, and nowhere more
    assert (gap[found > 0] - gap.max()).abs().max() <= 1e-14 * (1 + 10.0**exponent)


def test_points_of_the_simplex_stay() -> None:
    shares = torch.tensor([0.2, 0.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(project_simplex(shares), shares)


def test_entries_that_are_ruled_out() -> None:
    point = torch.tensor([-torch.inf, 3.0, 2.9, -torch.inf], dtype=torch.float64)
    expected = torch.tensor([0, 0.55, 0.45, 0], dtype=torch.float64)
    torch.testing.assert_close(project_simplex(point), expected)
