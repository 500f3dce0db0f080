import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, draw, rows
from torch import Tensor

from gradbal.solvers import combined_min_norm, cvxpy_min_norm, min_norm

EPS = torch.finfo(torch.float64).eps


def sides_of(m: int, p: int, seed: int = 0) -> Tensor:
    """Differences of unit vectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.rand(p + 1, m, generator=generator, dtype=torch.float64)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return vectors[1:] - vectors[0]


def some(count: int, seed: int = 0) -> Tensor:
    part = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.6
    part[0] = True
    return part


def vectors_of(jac: Tensor, sides: Tensor, part: Tensor) -> Tensor:
    return torch.cat((jac, sides @ jac))[part]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("m", [2, 3, 8, 16, 40, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_vectors_are_as_near_as_the_shortest(family: str, m: int, capturable: bool) -> None:
    if capturable and m > 40:
        return
    jac, sides = draw(family, m), sides_of(m, 3)
    part = some(m + 3)
    found = combined_min_norm(jac @ jac.T, sides, part, eps=EPS, capturable=capturable)
    assert found.converged
    direction, hull = found.value @ jac, vectors_of(jac, sides, part)
    excess = hull @ direction - direction @ direction
    size = torch.maximum(direction.norm(), 1e-7 * hull.norm(dim=1).max())  # the hull may hold 0
    assert (excess >= -1e-8 * hull.norm(dim=1) * size).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy(family: str) -> None:
    for seed in range(5):
        jac, sides = draw(family, 5, seed), sides_of(5, 3, seed)
        part = some(8, seed)
        hull = vectors_of(jac, sides, part)
        judge = cvxpy_min_norm(hull @ hull.T)
        found = combined_min_norm(jac @ jac.T, sides, part, eps=EPS).value @ jac
        size = hull.norm(dim=1).max().item()
        torch.testing.assert_close(found, judge.value @ hull, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("m", [2, 3, 8])
def test_vectors_far_apart_lose_no_digits(m: int) -> None:
    for seed in range(20):
        jac, sides = draw("six_decades", m, seed), sides_of(m, 1, seed)
        part = torch.ones(m + 1, dtype=torch.bool)
        found, other = (
            combined_min_norm(factor**2 * jac @ jac.T, sides, part, eps=EPS).value
            for factor in (1.0, 3.0)
        )
        scale = (found.abs() * jac.norm(dim=1)).sum().item()
        torch.testing.assert_close(other @ jac, found @ jac, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", EDGES)
def test_both_paths_agree_on_edge_cases(name: str) -> None:
    jac = rows(EDGES[name])
    sides = sides_of(len(jac), 2)
    for part in (some(len(jac) + 2), torch.ones(len(jac) + 2, dtype=torch.bool)):
        host, device = (
            combined_min_norm(jac @ jac.T, sides, part, eps=EPS, capturable=flag)
            for flag in (False, True)
        )
        assert host.value.isfinite().all()
        torch.testing.assert_close(device.value @ jac, host.value @ jac, rtol=0, atol=1e-7)


@pytest.mark.parametrize("capturable", [False, True])
def test_parts_of_the_hull(capturable: bool) -> None:
    jac, sides = draw("conflicting", 4), sides_of(4, 2)
    gram, nothing = jac @ jac.T, torch.zeros(6, dtype=torch.bool)
    empty = combined_min_norm(gram, sides, nothing, eps=EPS, capturable=capturable)
    assert empty.value.tolist() == [0, 0, 0, 0]
    tasks = torch.arange(6) < 4
    plain = combined_min_norm(gram, sides, tasks, eps=EPS, capturable=capturable)
    torch.testing.assert_close(plain.value, min_norm(gram).value)
    one = torch.arange(6) == 5
    lone = combined_min_norm(gram, sides, one, eps=EPS, capturable=capturable)
    torch.testing.assert_close(lone.value, sides[1])


@settings(derandomize=True, deadline=None, max_examples=40)
@given(m=st.integers(1, 9), exponent=st.integers(-60, 60), seed=st.integers(0, 999))
def test_scale_and_order_play_no_part(m: int, exponent: int, seed: int) -> None:
    jac, sides = draw("well_conditioned", m, seed), sides_of(m, 3, seed)
    part = some(m + 3, seed)
    found = combined_min_norm(jac @ jac.T, sides, part, eps=EPS).value
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    scaled = jac[order] * 10.0**exponent
    moved = torch.cat((part[:m][order], part[m:]))
    other = combined_min_norm(scaled @ scaled.T, sides[:, order], moved, eps=EPS).value
    torch.testing.assert_close(other, found[order], rtol=1e-9, atol=1e-12)


def test_not_square() -> None:
    with pytest.raises(ValueError, match=r"^`gram` must have shape \[m, m\], got \[2, 3\]\.$"):
        combined_min_norm(torch.zeros(2, 3), torch.zeros(1, 2), torch.ones(3).bool(), eps=EPS)
