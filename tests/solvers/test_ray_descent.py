import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, draw, half_rank_stationary, rows, unit
from torch import Tensor

from gradbal.solvers import cvxpy_ray_descent, ray_descent

EPS = torch.finfo(torch.float64).eps
SIZES = [1, 2, 3, 8, 16, 40, 128]
INDEPENDENT = ["well_conditioned", "conflicting", "six_decades", "correlated"]


def question(m: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A ray and an excess over it."""
    generator = torch.Generator().manual_seed(seed)
    ray = 0.1 + torch.rand(m, generator=generator, dtype=torch.float64)
    return ray, 100 * torch.rand(m, generator=generator, dtype=torch.float64)


def order(q: int, m: int) -> Tensor:
    generator = torch.Generator().manual_seed(q)
    return torch.rand(q, m, generator=generator, dtype=torch.float64) - 0.2


def violation(jac: Tensor, ray: Tensor, excess: Tensor, cone: Tensor, weights: Tensor) -> float:
    r"""How far progress is from ``b + s r``, and the weights from any sum of cone and constraint.

    Such a sum has :math:`r^\top w = (A r)^\top \lambda`, with :math:`\lambda` on the simplex and
    only where the progress :math:`A J d` is least.
    """
    directions, norms = unit(jac)
    direction = weights @ jac
    off = directions @ direction - excess / norms
    along = ray / norms
    off = off - (along @ off) / (along @ along) * along
    missed = off.abs().max() / torch.maximum(direction.norm(), (excess / norms).abs().max())
    progress, rates = cone @ (jac @ direction), cone @ ray
    terms = (cone.abs() * norms).sum(dim=1).max() * (weights.abs() * norms).sum()
    least = progress <= progress.min() + 1e-8 * terms
    share, size = ray @ weights, (ray * weights.abs()).sum()
    outside = torch.maximum(share - rates[least].max(), rates[least].min() - share)
    return max(missed.item(), (outside / size).item())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", INDEPENDENT)
def test_optimality_conditions(family: str, m: int, capturable: bool) -> None:
    if capturable and m > 40:
        return  # the rotations of a Jacobi sweep are slow on the host
    jac = draw(family, m)
    ray, excess = question(m)
    for cone in (None, order(m + 2, m)):
        solution = ray_descent(jac @ jac.T, ray, excess, eps=EPS, cone=cone, capturable=capturable)
        assert solution.converged
        identity = torch.eye(m, dtype=torch.float64)
        given = identity if cone is None else cone
        assert violation(jac, ray, excess, given, solution.value) <= 1e-8


@pytest.mark.parametrize("m", [2, 5, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy(family: str, m: int) -> None:
    jac = draw(family, m)
    ray, excess = question(m)
    for cone in (None, order(3, m)):
        judge = cvxpy_ray_descent(jac @ jac.T, ray, excess, cone=cone)
        assert judge.converged
        found = ray_descent(jac @ jac.T, ray, excess, eps=EPS, cone=cone).value @ jac
        size = found.norm().item()
        torch.testing.assert_close(judge.value @ jac, found, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("with_cone", [False, True])
def test_all_paths_agree_on_edge_cases(name: str, with_cone: bool) -> None:
    jac = rows(EDGES[name])
    gram, (ray, excess) = jac @ jac.T, question(len(jac))
    cone = order(2, len(jac)) if with_cone else None
    host, device = (
        ray_descent(gram, ray, excess, eps=EPS, cone=cone, capturable=flag)
        for flag in (False, True)
    )
    assert host.converged
    assert device.converged
    assert host.value.isfinite().all()
    assert (host.value[jac.norm(dim=1) == 0] == 0).all()
    judge = cvxpy_ray_descent(gram, ray, excess, cone=cone)
    size = 1 + (host.value.abs() * jac.norm(dim=1)).sum().item()
    for other, accuracy in ((device, 1e-8), (judge, 1e-4)):
        torch.testing.assert_close(
            other.value @ jac, host.value @ jac, rtol=0, atol=accuracy * size
        )


@pytest.mark.parametrize("m", [4, 9, 20])
def test_dependent_vectors_make_the_nearest_progress(m: int) -> None:
    jac = half_rank_stationary(m, torch.Generator().manual_seed(m))
    directions, norms = unit(jac)
    ray, excess = question(m)
    found = ray_descent(jac @ jac.T, ray, excess, eps=EPS).value @ jac
    unknown = torch.cat((directions, -(ray / norms)[:, None]), dim=1)  # d and s
    best = torch.linalg.lstsq(unknown, excess / norms, driver="gelsd").solution
    torch.testing.assert_close(found, best[:-1], rtol=0, atol=1e-8 * best.norm().item())


@pytest.mark.parametrize("m", [3, 12])
def test_vectors_of_length_zero_are_left_out(m: int) -> None:
    jac = draw("conflicting", m)
    jac[0] = jac[2] = 0
    there = jac.norm(dim=1) > 0
    ray, excess = question(m)
    for cone in (None, order(4, m)):
        found = ray_descent(jac @ jac.T, ray, excess, eps=EPS, cone=cone).value
        some = jac[there]
        part = None if cone is None else cone[:, there]
        alone = ray_descent(some @ some.T, ray[there], excess[there], eps=EPS, cone=part).value
        assert (found[~there] == 0).all()
        torch.testing.assert_close(found[there], alone)


@pytest.mark.parametrize("capturable", [False, True])
def test_rows_of_the_cone_for_absent_vectors_alone_are_left_out(capturable: bool) -> None:
    moved = 0
    for seed in range(8):
        jac = draw("conflicting", 4, seed)
        jac[1] = 0
        gram, (ray, excess) = jac @ jac.T, question(4, seed)
        cone = order(3, 4)
        alone = torch.eye(4, dtype=torch.float64)[1:2]
        found, wanted = (
            ray_descent(gram, ray, excess, eps=EPS, cone=rows, capturable=capturable).value
            for rows in (torch.cat((cone, alone)), cone)
        )
        torch.testing.assert_close(found, wanted)
        progress = cone @ (jac @ (wanted @ jac))  # a row of zeros would have none
        moved += bool((progress < 0).any())
    assert moved > 0


@pytest.mark.parametrize("m", [1, 3, 12])
def test_the_closed_form_takes_no_iterations(m: int) -> None:
    jac = draw("conflicting", m)
    for cone in (None, order(2, m)):
        assert ray_descent(jac @ jac.T, *question(m), eps=EPS, cone=cone).n_iter == 0


def test_nothing_at_all() -> None:
    for capturable in (False, True):
        ray, excess = question(3)
        found = ray_descent(torch.zeros(3, 3).double(), ray, excess, eps=EPS, capturable=capturable)
        assert found.converged
        assert found.value.tolist() == [0, 0, 0]


def test_on_the_ray_the_gradients_are_balanced() -> None:
    jac = draw("conflicting", 5)
    ray = torch.ones(5, dtype=torch.float64)
    found = ray_descent(jac @ jac.T, ray, 3e30 * ray, eps=EPS).value
    progress = jac @ (found @ jac)
    torch.testing.assert_close(progress, progress.mean().expand(5))
    torch.testing.assert_close(found.sum().item(), 1.0)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(m=st.integers(1, 12), exponent=st.integers(-60, 60), seed=st.integers(0, 999))
def test_scale_and_order_play_no_part(m: int, exponent: int, seed: int) -> None:
    jac = draw("conflicting", m, seed)
    ray, excess = question(m, seed)
    found = ray_descent(jac @ jac.T, ray, excess, eps=EPS).value
    mixed = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    factor = 10.0**exponent
    scaled = jac[mixed] * factor
    other = ray_descent(scaled @ scaled.T, 7 * ray[mixed], excess[mixed] * factor**2, eps=EPS).value
    torch.testing.assert_close(other, found[mixed], rtol=1e-6, atol=1e-9 * found.abs().max())


def test_not_square() -> None:
    with pytest.raises(ValueError, match=r"^`gram` must have shape \[m, m\], got \[2, 3\]\.$"):
        ray_descent(torch.zeros(2, 3), torch.ones(2), torch.ones(2), eps=EPS)


def test_device_bound_callers_are_turned_away() -> None:
    message = r"^The reference solvers need `capturable=False`, got True: CVXPY runs on the host\. "
    with pytest.raises(ValueError, match=message):
        cvxpy_ray_descent(torch.eye(2), torch.ones(2), torch.ones(2), capturable=True)
