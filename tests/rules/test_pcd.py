"""PCD beside its optimality conditions and CVXPY, and what its averages remember."""

import cvxpy
import pytest
import torch
from cases import J3, conflicting, correlated, decades, normal, rows
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.step.weighting import MODEL


def weights_of(jacobian: Tensor, **options: object) -> Tensor:
    weights = aggregate(jacobian, make_rule("pcd", **options)).weights
    assert weights is not None
    return weights


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("m", [2, 3, 8, 16, 40])
@pytest.mark.parametrize("family", ["any", "narrow", "correlated", "six decades"])
def test_conditions_of_optimality(family: str, m: int, tau: float, scale: float) -> None:
    jacobian = {
        "any": normal(m, 4 * m + 8, seed=m),
        "narrow": normal(m, 2 * m + 2, seed=m),
        "correlated": correlated(m, seed=m),
        "six decades": normal(m, 3 * m, seed=m) * decades(m, seed=m).norm(dim=1)[:, None],
    }[family]
    norms = jacobian.norm(dim=1)
    weights = weights_of(scale * jacobian, tau=tau)
    direction = jacobian.T @ weights
    torch.testing.assert_close(direction.norm(), norms[0], rtol=1e-9, atol=0)
    shares = weights * norms / (weights[0] * norms[0])  # with g_1 of length 1 as it is
    gains = jacobian @ (jacobian.T / norms @ shares) / norms
    multipliers, slack = shares[1:], gains[1:] - tau
    assert torch.minimum(multipliers, slack).abs().max() <= 1e-8 * max(1, multipliers.max())
    assert gains[0] > 0


@pytest.mark.parametrize("m", [2, 3, 6])
def test_same_as_cvxpy(m: int) -> None:
    jacobian = normal(m, m + 4, seed=m)
    units = torch.nn.functional.normalize(jacobian, dim=1).numpy()
    taus = (0.0, *(0.1 * k for k in range(1, m)))
    d = cvxpy.Variable(units.shape[1])
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum_squares(d - units[0])), [units[1:] @ d >= list(taus[1:])]
    )
    problem.solve(solver=cvxpy.CLARABEL)
    expected = torch.from_numpy(d.value)
    found = aggregate(jacobian, make_rule("pcd", taus=taus)).direction
    expected = expected / expected.norm() * jacobian[0].norm()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_first_gradient_where_nothing_is_in_its_way() -> None:
    weights = weights_of(rows([[1, 2, 0, 1], [2, 1, 1, 0], [0.5, 1, 3, 1]]))
    assert weights.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    "table",
    [
        [[1, 2], [-1, -2]],  # what is left points the other way
        [[1, 0], [-1, 1e-3]],
        [[1, 1], [1, 0], [-1, 0]],  # no direction serves both of the others
        [[1, 1, 1], [1, 0, 0], [-1, 0.5, 0], [0, -1, 0]],
        [[1, 0], [0, 0]],
    ],
)
def test_the_first_gradient_where_nothing_else_is_left(table: list[list[float]]) -> None:
    for size in (1e-12, 1.0, 1e12):
        assert weights_of(size * rows(table)).tolist() == [1, *[0] * (len(table) - 1)]


@pytest.mark.parametrize("m", [2, 8, 40])
def test_the_first_gradient_where_the_others_drive_it_uphill(m: int) -> None:
    jacobian = conflicting(m, seed=m)
    assert weights_of(jacobian).tolist() == [1, *[0] * (m - 1)]
    eased = aggregate(jacobian, make_rule("pcd", tau=0.0)).direction
    assert (jacobian @ eased >= -1e-9 * jacobian.norm() * eased.norm()).all()


def test_turned_as_far_as_needed_for_the_others() -> None:
    direction = aggregate(rows([[1, 0], [-1, 1]]), make_rule("pcd", tau=0.0)).direction
    torch.testing.assert_close(direction, rows([[1, 1]])[0] / 2**0.5)


def test_averages_with_a_start_of_their_own() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    rule = make_rule("pcd", beta=0.75)
    mtl_opt = MTLOptimizer(torch.optim.SGD([parameter], lr=0.0), rule, tasks=["a", "b", "c"])
    history: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for step, present in enumerate(["ab", "abc", "ac", "abc"]):
        losses = {task: (1 + step + ord(task) % 3) * parameter[0] for task in present}
        for task, loss in losses.items():
            history[task].append(loss.item() ** 2)
        mtl_opt.step(losses)
    state = mtl_opt.core.state[MODEL]
    assert state["steps"].tolist() == [4, 3, 3]
    for average, squares in zip(state["squares"], history.values(), strict=True):
        shares = 0.75 ** torch.arange(len(squares)).flip(0)
        expected = (shares * torch.tensor(squares)).sum() / shares.sum()
        assert average.item() == pytest.approx(expected.item())


def test_averages_over_steps_change_what_is_asked() -> None:
    small = rows([[1, 0, 0], [-0.6, 0.8, 0], [0, -0.6, 0.8]])
    state = aggregate(small * rows([[1], [100], [1]]), "pcd").state
    fresh = aggregate(small, make_rule("pcd", tau=0.5))
    later = aggregate(small, make_rule("pcd", tau=0.5), state=state)
    assert fresh.weights is not None
    assert later.weights is not None
    norms = state["tensors"]["squares"] * 0.999 / (1 + 0.999) + 1 / 1.999
    sizes = norms.rsqrt()  # of the scaled gradients, now that all have length 1
    gains = small @ later.direction / later.weights[0] * sizes[0]
    multipliers = later.weights[1:] / later.weights[0] * sizes[0]
    slack = gains[1:] - 0.5 * sizes[1:]
    assert torch.minimum(multipliers, slack).abs().max() <= 1e-9
    assert not torch.allclose(fresh.weights, later.weights)


def test_plain_averages() -> None:
    rule, state = make_rule("pcd", beta=1.0), None
    for size in (1.0, 2.0, 3.0):
        state = aggregate(size * rows(J3), rule, state=state).state
    squares = rows(J3).square().sum(dim=1) * (1 + 4 + 9) / 3
    torch.testing.assert_close(state["tensors"]["squares"], squares)
