"""FERERO: its constraint, its two forms, and where it leads."""

from typing import Any

import pytest
import torch
from cases import conflicting, correlated, decades, losses_for, normal, seeded, wells
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules._base import Rule


def ray_of(m: int, seed: int) -> Tensor:
    return 0.5 + torch.rand(m, generator=seeded(seed), dtype=torch.float64)


def rule_for(ray: Tensor, **options: Any) -> Rule:
    return make_rule("ferero", preferences=tuple(ray.tolist()), **options)


def constraints(ray: Tensor) -> Tensor:
    """Rows that vanish on the ray."""
    above = torch.diag(ray[1:]) @ torch.eye(len(ray), dtype=ray.dtype)[:-1]
    return above - torch.diag(ray[:-1]) @ torch.eye(len(ray), dtype=ray.dtype)[1:]


@pytest.mark.parametrize("c_h", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("m", [2, 3, 8, 20])
def test_the_constraint_decays(m: int, c_h: float) -> None:
    for seed, make in enumerate((conflicting, correlated, decades)):
        jacobian, losses, ray = make(m, seed=m), losses_for(m, seed=seed), ray_of(m, seed)
        direction = aggregate(jacobian, rule_for(ray, c_h=c_h), losses=losses).direction
        matrix = constraints(ray)
        terms = (matrix.abs() @ jacobian.norm(dim=1)) * direction.norm() + losses.max()
        off = matrix @ (jacobian @ direction - c_h * losses)
        assert (off.abs() <= 1e-8 * terms).all()


@pytest.mark.parametrize("m", [2, 3, 6])
def test_agrees_with_cvxpy(m: int) -> None:
    for seed, make in enumerate((conflicting, correlated, decades)):
        jacobian, losses, ray = make(m, seed=m), losses_for(m, seed=seed), ray_of(m, seed)
        cone = tuple(map(tuple, torch.rand(3, m, generator=seeded(seed)).tolist()))
        for options in ({}, {"cone": cone}):
            ours, theirs = (
                aggregate(jacobian, rule_for(ray, solver=solver, **options), losses=losses)
                for solver in ("exact", "cvxpy")
            )
            size = ours.direction.norm().item()
            torch.testing.assert_close(ours.direction, theirs.direction, rtol=0, atol=1e-4 * size)


def test_the_identity_is_the_default_cone() -> None:
    jacobian, losses, ray = conflicting(4, seed=2), losses_for(4), ray_of(4, 0)
    eye = tuple(map(tuple, torch.eye(4).tolist()))
    for options in ({}, {"step_size": 0.5}):
        ours = aggregate(jacobian, rule_for(ray, **options), losses=losses)
        theirs = aggregate(jacobian, rule_for(ray, cone=eye, **options), losses=losses)
        torch.testing.assert_close(ours.direction, theirs.direction)


@pytest.mark.parametrize("with_cone", [False, True])
def test_the_single_loop_ends_at_the_exact_solution(with_cone: bool) -> None:
    jacobian, losses, ray = normal(3, 8, seed=3), losses_for(3), ray_of(3, 1)
    cone = ((1.0, 0.2, 0.0), (0.1, 1.0, 0.3)) if with_cone else None
    exact = aggregate(jacobian, rule_for(ray, cone=cone), losses=losses).direction
    rule, state = rule_for(ray, cone=cone, step_size=0.9), None
    for _ in range(800):
        result = aggregate(jacobian, rule, losses=losses, state=state)
        state = result.state
    torch.testing.assert_close(result.direction, exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradients", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_single_loop_knows_no_unit(gradients: float, size: float) -> None:
    rule = make_rule("ferero", step_size=0.5)
    states: list[Any] = [None, None]
    for seed in range(5):
        jacobian, losses = normal(3, 5, seed=seed), losses_for(3, seed=seed)
        plain = aggregate(jacobian, rule, losses=losses * size, state=states[0])
        scaled = aggregate(
            jacobian * gradients, rule, losses=losses * size * gradients**2, state=states[1]
        )
        states = [plain.state, scaled.state]
        torch.testing.assert_close(scaled.weights, plain.weights, rtol=1e-9, atol=1e-12)


def test_the_single_loop_forgets_no_task() -> None:
    """Absent tasks keep their multipliers; those without gradient have none."""
    parameter = torch.nn.Parameter(normal(4, seed=1))
    mtl_opt = MTLOptimizer(
        torch.optim.SGD([parameter], lr=0.01),
        make_rule("ferero", step_size=0.5, preferences=(1.0, 2.0, 3.0)),
        tasks=("a", "b", "c"),
    )
    heights = normal(3, 4, seed=2)
    for names in ("abc", "ac", "abc", "b"):
        found = {n: (parameter @ heights["abc".index(n)] - 3).square() for n in names}
        before = {k: t.clone() for k, t in mtl_opt.core.state.get("model", {}).items()}
        mtl_opt.step(found)
        after = mtl_opt.core.state["model"]
        assert all(tensor.isfinite().all() for tensor in after.values())
        for i, name in enumerate("abc"):
            if before and name not in names:
                assert after["shares"][i] == before["shares"][i]
                assert after["multipliers"][i] == before["multipliers"][i]
    nothing = aggregate(torch.zeros(2, 3), make_rule("ferero", step_size=0.5), losses=[1, 5])
    assert nothing.direction.tolist() == [0, 0, 0]
    jacobian = conflicting(3, seed=4)
    jacobian[1] = 0
    partly = aggregate(jacobian, make_rule("ferero", step_size=0.5), losses=[1, 5, 2])
    assert partly.weights is not None
    assert partly.weights[1] == 0


def test_tasks_without_gradient_take_no_part() -> None:
    jacobian = conflicting(4, seed=1)
    jacobian[1] = 0
    others, losses, ray = [0, 2, 3], losses_for(4), ray_of(4, 2)
    found = aggregate(jacobian, rule_for(ray), losses=losses).weights
    assert found is not None
    assert found[1] == 0
    alone = aggregate(jacobian[others], rule_for(ray[others]), losses=losses[others]).weights
    torch.testing.assert_close(found[others], alone)


@pytest.mark.parametrize("options", [{}, {"step_size": 0.9}])
@pytest.mark.parametrize(("m", "seed"), [(2, 1), (2, 2), (3, 1)])
def test_reaches_the_front_on_its_ray(m: int, seed: int, options: dict[str, Any]) -> None:
    ray, point, state = ray_of(m, seed) ** 0.5, 0.5 * normal(6, seed=seed), None
    rule = rule_for(1 / ray, c_h=0.5, **options)
    for _ in range(250):
        losses, jacobian = wells(point, m)
        result = aggregate(jacobian, rule, losses=losses, state=state)
        point, state = point - 0.1 * result.direction, result.state
    losses, jacobian = wells(point, m)
    shares = losses * ray
    assert (shares / shares.mean() - 1).abs().max() <= 1e-3
    assert aggregate(jacobian, "mgda").direction.norm() <= 1e-6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"preferences": (1.0, 0.0)}, "FERERO: `preferences` must be > 0, got 0.0."),
        ({"c_h": 0}, "FERERO: `c_h` must be > 0, got 0."),
        ({"step_size": -1}, "FERERO: `step_size` must be > 0, got -1."),
        (
            {"cone": ((1.0,), (1.0, 2.0))},
            "FERERO: `cone` must be vectors with one number for each task, got lengths [1, 2].",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match="FERERO") as caught:
        make_rule("ferero", **options)
    assert str(caught.value) == sentence


def test_a_cone_for_other_tasks() -> None:
    sentence = r"^FERERO: `cone_columns` must have one number for each of the 3 tasks, got 2\.$"
    with pytest.raises(ValueError, match=sentence):
        aggregate(normal(3, 3), make_rule("ferero", cone=((1.0, 2.0),)), losses=[1, 2, 3])
