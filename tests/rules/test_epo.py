"""EPO: its linear programs, judged from the task gradients, and where it leads."""

import pytest
import scipy.optimize
import torch
from cases import conflicting, correlated, decades, losses_for, normal, rows, seeded, wells
from torch import Tensor

from gradbal import aggregate, make_rule
from gradbal.rules._base import Rule

TOL = 1e-9


def uneven(losses: Tensor, ray: Tensor) -> tuple[float, Tensor]:
    """The non-uniformity and the weights of the direction against it."""
    shares = ray * losses / (ray @ losses)
    logs = (len(losses) * shares).log()
    level = shares @ logs
    return level.item(), ray * (logs - level)


def weights_of(jacobian: Tensor, rule: Rule | str, losses: Tensor) -> Tensor:
    weights = aggregate(jacobian, rule, losses=losses).weights
    assert weights is not None
    return weights


def ray_of(m: int, seed: int) -> Tensor:
    return 0.5 + torch.rand(m, generator=seeded(seed), dtype=torch.float64)


def problems(m: int) -> list[Tensor]:
    return [make(m, seed=m) for make in (conflicting, correlated, decades)] + [
        normal(m, m + 2, seed=seed) for seed in range(4)
    ]


@pytest.mark.parametrize("m", [2, 3, 8])
def test_balancing_lets_no_task_rise_that_need_not(m: int) -> None:
    for seed, jacobian in enumerate(problems(m)):
        losses, ray = losses_for(m, seed=seed), ray_of(m, seed)
        _, lean = uneven(losses, ray)
        norms, pull = jacobian.norm(dim=1), jacobian @ (lean @ jacobian)
        rule = make_rule("epo", preferences=tuple(ray.tolist()))
        falls = jacobian @ aggregate(jacobian, rule, losses=losses).direction
        slack = TOL * norms * norms.max()
        if not (pull > 0).any():
            assert (falls >= -slack).all()
            continue
        worst = (ray * losses).argmax()
        assert falls[worst] >= -slack[worst]
        raised = (pull <= 0) & (torch.arange(m) != worst)
        assert (falls >= pull - slack - TOL * pull.abs())[raised].all()


@pytest.mark.parametrize("m", [2, 3, 8])
def test_descent_lowers_the_sum_most(m: int) -> None:
    for jacobian in problems(m):
        gram = jacobian @ jacobian.T
        units = jacobian / jacobian.norm(dim=1, keepdim=True)
        judge = scipy.optimize.linprog(
            -(gram.sum(0) / gram.sum(0).abs().max()).numpy(),
            A_ub=-(units @ jacobian.T / jacobian.norm()).numpy(),
            b_ub=[0.0] * m,
            A_eq=torch.ones(1, m).numpy(),
            b_eq=[1],
        )
        weights = weights_of(jacobian, "epo", torch.full((m,), 3.0, dtype=torch.float64))
        assert abs(weights @ gram.sum(0) / gram.sum(0).abs().max() + judge.fun) <= 1e-8


def test_a_descent_keeps_to_the_ray_unless_relaxed() -> None:
    kept = 0
    for seed in range(40):
        jacobian = normal(3, 5, seed=seed)
        losses = 1 + 0.01 * torch.rand(3, generator=seeded(seed), dtype=torch.float64)
        level, lean = uneven(losses, torch.ones(3).double())
        assert level < 1e-4
        gram = jacobian @ jacobian.T
        pull = gram @ lean
        if pull.max() < 0:
            continue  # to keep to the ray then needs a lone task that does no other any harm
        tight, loose = (
            weights_of(jacobian, make_rule("epo", relaxed=relaxed), losses)
            for relaxed in (False, True)
        )
        for weights in (tight, loose):
            assert (gram @ weights >= -TOL).all()
        assert pull @ tight >= -TOL
        assert gram.sum(0) @ loose >= gram.sum(0) @ tight - TOL
        kept += bool(pull @ loose < -TOL)
    assert kept > 0


@pytest.mark.parametrize("m", [2, 3, 6])
def test_agrees_with_cvxpy(m: int) -> None:
    for seed, jacobian in enumerate(problems(m)):
        for losses in (losses_for(m, seed=seed), torch.ones(m).double()):
            ours = aggregate(jacobian, "epo", losses=losses)
            theirs = aggregate(jacobian, make_rule("epo", solver="cvxpy"), losses=losses)
            scale = jacobian.norm(dim=1).max().item()
            torch.testing.assert_close(ours.direction, theirs.direction, rtol=0, atol=1e-5 * scale)


def test_where_nothing_satisfies_all_conditions_preferences_decide() -> None:
    jacobian = normal(3, 2, seed=2905)
    losses = 2 * (1 + 1e-3 * torch.rand(3, generator=seeded(2905), dtype=torch.float64))
    for solver in ("exact", "cvxpy"):
        found = weights_of(jacobian, make_rule("epo", solver=solver), losses)
        torch.testing.assert_close(found, torch.full((3,), 1 / 3).double())


def test_tasks_without_gradient_take_no_part() -> None:
    jacobian = conflicting(4, seed=1)
    jacobian[1] = 0
    others = [0, 2, 3]
    for losses in (losses_for(4) * torch.tensor([1, 1e9, 1, 1]), torch.ones(4).double()):
        found = weights_of(jacobian, "epo", losses)
        assert found[1] == 0
        alone = weights_of(jacobian[others], "epo", losses[others])
        torch.testing.assert_close(found[others], alone)


@pytest.mark.parametrize("gradients", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("losses", [1e-30, 1.0, 1e30])
def test_units_play_no_part(gradients: float, losses: float) -> None:
    for jacobian in problems(3):
        found = weights_of(jacobian * gradients, "epo", losses_for(3) * losses)
        expected = weights_of(jacobian, "epo", losses_for(3))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rounding_errors_of_equal_losses_do_not_hold_back() -> None:
    for m in (3, 6, 7, 11):
        jacobian = correlated(m, seed=m)
        equal = torch.full((m,), 0.1, dtype=torch.float64)
        tight, loose = (
            weights_of(jacobian, make_rule("epo", relaxed=relaxed), equal)
            for relaxed in (False, True)
        )
        torch.testing.assert_close(tight, loose)


@pytest.mark.parametrize(("m", "seed"), [(2, 0), (2, 1), (3, 1), (3, 2)])
def test_reaches_the_front_on_its_ray(m: int, seed: int) -> None:
    ray, point = ray_of(m, seed) ** 0.5, 0.5 * normal(6, seed=seed)
    rule = make_rule("epo", preferences=tuple(ray.tolist()))
    for _ in range(250):
        losses, jacobian = wells(point, m)
        point = point - 0.1 * aggregate(jacobian, rule, losses=losses).direction
    losses, jacobian = wells(point, m)
    level, _ = uneven(losses, ray)
    assert level <= 1.5 * 1e-4
    assert aggregate(jacobian, "mgda").direction.norm() <= 1e-8 * jacobian.norm()


def test_loss_that_is_not_positive() -> None:
    sentence = (
        "EPO: losses must be > 0, got 0 for task '1'; shift the loss or choose a rule that does "
        "not take its logarithm."
    )
    with pytest.raises(ValueError, match="^" + sentence.replace(".", r"\.") + "$"):
        aggregate(rows([[1, 0], [0, 1]]), "epo", losses=[1, 0])
