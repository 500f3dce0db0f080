import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import EDGES, FAMILIES, GOLDEN, SIZES, draw, half_rank_stationary, rows, unit
from torch import Tensor

from gradbal.solvers import cvxpy_nonnegative_qp, equilibrate, nonnegative_qp

WEIGHTS = {  # of the mean of the projections of each task gradient onto the dual cone
    "J2": [1.25, 0.65],
    "J3": [0.908301, 0.618167, 0.468554],
    "JR": [0.5, 0.333333, 0.666667],
    "JP": [0.333333, 0.333333, 0.333333],
}


def violation(hessian: Tensor, linear: Tensor, z: Tensor) -> float:
    """Worst of ``z >= 0``, ``y >= 0`` and ``z y = 0``, relative to each right-hand side."""
    scale = linear.abs().amax(dim=-1, keepdim=True).clamp(min=1e-300)
    z, y = z / scale, (z @ hessian + linear) / scale
    return max((-z).max().item(), (-y).max().item(), torch.minimum(z, y).abs().max().item())


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_optimality_conditions(family: str, m: int) -> None:
    cosines, _ = equilibrate(draw(family, m) @ draw(family, m).T)
    solution = nonnegative_qp(cosines, cosines)
    assert solution.converged
    assert violation(cosines, cosines, solution.value) <= 1e-12


def test_many_tasks() -> None:
    jac = draw("conflicting", 128)
    cosines, _ = equilibrate(jac @ jac.T)
    linear = cosines[:10]
    assert violation(cosines, linear, nonnegative_qp(cosines, linear).value) <= 1e-12


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("m", [2, 3, 8, 16, 40, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_problem_at_a_time(family: str, m: int, size: float) -> None:
    """The projection of the mean gradient, and the shortest vector of the directions."""
    jac = size * draw(family, m)
    cosines, norms = equilibrate(jac @ jac.T)
    for hessian, linear in ((cosines, cosines @ norms), (cosines + 1, -torch.ones_like(norms))):
        solution = nonnegative_qp(hessian, linear)
        assert solution.converged
        assert violation(hessian, linear, solution.value) <= 1e-9


@pytest.mark.parametrize("m", [3, 8, 30])
@pytest.mark.parametrize("family", [*FAMILIES, "stationary"])
def test_agrees_with_nnls_on_the_rows(family: str, m: int) -> None:
    generator = torch.Generator().manual_seed(1)
    jac = half_rank_stationary(m, generator) if family == "stationary" else draw(family, m, 1)
    directions, _ = unit(jac)
    cosines, _ = equilibrate(jac @ jac.T)
    found = nonnegative_qp(cosines, cosines).value @ directions
    for i in range(m):
        judge, _ = scipy.optimize.nnls(directions.T.numpy(), -directions[i].numpy())
        torch.testing.assert_close(
            found[i], torch.from_numpy(judge) @ directions, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_cvxpy(family: str) -> None:
    cosines, _ = equilibrate(draw(family, 6) @ draw(family, 6).T)
    reference = cvxpy_nonnegative_qp(cosines, cosines)
    assert reference.converged
    found = nonnegative_qp(cosines, cosines).value
    torch.testing.assert_close(found @ cosines, reference.value @ cosines, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_golden_weights_of_upgrad(name: str) -> None:
    jac = rows(GOLDEN[name])
    cosines, norms = equilibrate(jac @ jac.T)
    lifted = norms @ nonnegative_qp(cosines, cosines).value / norms
    torch.testing.assert_close((1 + lifted) / len(jac), rows([WEIGHTS[name]])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_edge_cases(name: str, capturable: bool) -> None:
    jac = rows(EDGES[name])
    cosines, norms = equilibrate(jac @ jac.T)
    solution = nonnegative_qp(cosines, cosines, capturable=capturable)
    assert solution.converged
    assert solution.value.isfinite().all()
    assert (solution.value[:, norms == 0] == 0).all()
    assert violation(cosines, cosines, solution.value) <= 1e-9


@settings(derandomize=True, deadline=None, max_examples=40)
@given(m=st.integers(1, 9), exponent=st.integers(-150, 150), seed=st.integers(0, 999))
def test_any_size_and_scale(m: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    jac = torch.randn(m, 5, generator=generator, dtype=torch.float64)  # often m > n
    cosines, _ = equilibrate(jac @ jac.T)
    linear = unit(jac)[0] @ torch.randn(5, 2, generator=generator, dtype=torch.float64)
    linear = linear.T * 10.0**exponent
    solution = nonnegative_qp(cosines, linear)
    assert solution.converged
    assert violation(cosines, linear, solution.value) <= 1e-9


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_leading_shape_is_kept(shape: tuple[int, ...]) -> None:
    linear = torch.randn(*shape, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = nonnegative_qp(torch.eye(4, dtype=torch.float64), linear)
    torch.testing.assert_close(solution.value, (-linear).clamp(min=0))
    assert solution.residual.shape == ()


def test_too_few_iterations_are_told() -> None:
    jac = draw("conflicting", 30)
    cosines, _ = equilibrate(jac @ jac.T)
    solution = nonnegative_qp(cosines, cosines, max_iter=1)
    assert not solution.converged
    assert solution.value.isfinite().all()
    assert (solution.value >= 0).all()


def test_not_square() -> None:
    with pytest.raises(ValueError, match=r"^`hessian` must have shape \[m, m\], got \[2, 3\]\.$"):
        nonnegative_qp(torch.zeros(2, 3), torch.zeros(3))
