"""`aggregate`: what goes in, what comes out, what is refused, and in which precision."""

import copy
import io
import re
from typing import Any

import pytest
import torch
from cases import J3, losses_for, normal, rows, seeded

import gradbal
from gradbal import aggregate, make_rule
from gradbal.rules._base import LossRule
from gradbal.rules._registry import RULES

L3 = [0.5, 2.0, 1.0]
ALONE = [name for name, entry in RULES.items() if min(entry.rule.batches) == 1]
AT_GRADIENTS = [name for name in ALONE if not issubclass(RULES[name].rule, LossRule)]
WEIGHTED = [name for name in ALONE if getattr(make_rule(name), "weighted", True)]
ELEMENTWISE = [name for name in ALONE if name not in WEIGHTED]


def refused(sentence: str) -> Any:  # pytest's context manager
    return pytest.raises((TypeError, ValueError), match=f"^{re.escape(sentence)}$")


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("jacobian", "sentence"),
    [
        (3, "aggregate: `jacobian` must be a floating-point tensor, got int."),
        ([[1.0]], "aggregate: `jacobian` must be a floating-point tensor, got list."),
        (
            torch.ones(2, 2, dtype=torch.int64),
            "aggregate: `jacobian` must be a floating-point tensor, got torch.int64.",
        ),
        (
            torch.ones(2, 2, dtype=torch.complex64),
            "aggregate: `jacobian` must be a floating-point tensor, got torch.complex64.",
        ),
        (
            torch.ones(3),
            "aggregate: `jacobian` must have shape [m, n], one row per task, got [3].",
        ),
        (
            torch.ones(0, 3),
            "aggregate: `jacobian` must have shape [m, n], one row per task, got [0, 3].",
        ),
        (
            torch.ones(3, 0),
            "aggregate: `jacobian` must have shape [m, n], one row per task, got [3, 0].",
        ),
        (
            torch.ones(1, 2, 3),
            "aggregate: `jacobian` must have shape [m, n], one row per task, got [1, 2, 3].",
        ),
    ],
)
def test_jacobians_that_cannot_be(jacobian: Any, sentence: str) -> None:
    with refused(sentence):
        aggregate(jacobian)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([1.0, 2.0], "aggregate: `losses` must have shape [3], got [2]."),
        (torch.ones(3, 1), "aggregate: `losses` must have shape [3], got [3, 1]."),
        (1.0, "aggregate: `losses` must have shape [3], got []."),
        ("abc", "aggregate: `losses` must be numbers, one per row, got 'abc'."),
        ([1.0, "b", 2.0], "aggregate: `losses` must be numbers, one per row, got [1.0, 'b', 2.0]."),
    ],
)
def test_losses_that_cannot_be(losses: Any, sentence: str) -> None:
    with refused(sentence):
        aggregate(rows(J3), losses=losses)


def test_losses_that_are_missing() -> None:
    with refused("aggregate: GLS looks at the losses; pass `losses=`, one per row."):
        aggregate(rows(J3), "gls")


@pytest.mark.parametrize("name", [n for n in ALONE if not make_rule(n).needs_losses])
def test_losses_that_nobody_needs(name: str) -> None:
    assert aggregate(rows(J3), name).direction.isfinite().all()


def test_rules_that_look_ahead_need_further_batches() -> None:
    with refused(
        "aggregate: AutoLambda takes 2 or 3 batches, got 1; `more` holds the further ones."
    ):
        aggregate(rows(J3), "auto_lambda")
    with refused(
        "AutoLambda: the last batch is looked at from other parameters, so it must be a function "
        "that returns its losses: `step(losses, lambda: losses_of(batch))`."
    ):
        aggregate(rows(J3), "auto_lambda", more=[rows(J3)])


def test_jacobians_of_other_batches_have_the_same_shape() -> None:
    sentence = "aggregate: every Jacobian in `more` must have shape [3, 4], got [2, 4]."
    with refused(sentence):
        aggregate(rows(J3), "modo", more=[rows(J3)[:2]])


def test_several_batches() -> None:
    with refused("aggregate: MGDA takes 1 batch, got 3; `more` holds the further ones."):
        aggregate(rows(J3), "mgda", more=[rows(J3), rows(J3)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ALONE)
def test_what_is_not_finite_is_named(name: str, value: float) -> None:
    sentence = "aggregate: row or loss 1 is not finite; every entry must be a number."
    losses = [1.0, value, 2.0]
    with refused(sentence):
        aggregate(rows(J3), name, losses=losses)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    jacobian = rows(J3).to(dtype)
    jacobian[2, 1] = value
    for name in AT_GRADIENTS:
        with refused("aggregate: row or loss 2 is not finite; every entry must be a number."):
            aggregate(jacobian, name, losses=L3)


def test_states_that_do_not_fit() -> None:
    state = aggregate(rows(J3), "gradvac").state
    sentence = (
        "aggregate: `state` belongs to the rule GradVac, this one is MGDA; pass None to start anew."
    )
    with refused(sentence):
        aggregate(rows(J3), "mgda", state=state)
    sentence = (
        "aggregate: `state` belongs to 3 tasks, the Jacobian has 2 rows; pass None to start anew."
    )
    with refused(sentence):
        aggregate(rows(J3)[:2], "gradvac", state=state)


def test_options_for_another_number_of_tasks() -> None:
    sentence = "UPGrad: `preferences` must have one number for each of the 3 tasks, got 2."
    with refused(sentence):
        aggregate(rows(J3), make_rule("upgrad", preferences=(1.0, 2.0)))


# ---------------------------------------------------------------------------- what comes out


def test_the_default_is_upgrad() -> None:
    assert torch.equal(aggregate(rows(J3)).direction, aggregate(rows(J3), "upgrad").direction)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_rules_have_no_weights(name: str) -> None:
    assert aggregate(rows(J3), name, losses=L3).weights is None


def test_solvers_report() -> None:
    for name in ("mgda", "upgrad", "cagrad", "nash_mtl"):
        assert aggregate(rows(J3), name).stats["residual"] <= 1e-8


def test_nothing_requires_a_gradient() -> None:
    jacobian = rows(J3).requires_grad_()
    result = aggregate(jacobian, "upgrad", losses=torch.ones(3, requires_grad=True))
    assert not result.direction.requires_grad
    assert jacobian.grad is None


def test_views_and_strides() -> None:
    jacobian = normal(3, 8, seed=2)
    wide = torch.zeros(3, 16, dtype=torch.float64)
    wide[:, ::2] = jacobian
    for name in ALONE:
        plain = aggregate(jacobian, name, losses=L3).direction
        for view in (wide[:, ::2], jacobian.T.contiguous().T):
            torch.testing.assert_close(aggregate(view, name, losses=L3).direction, plain)


# ---------------------------------------------------------------------------- state and chance


@pytest.mark.parametrize("name", ALONE)
def test_state_is_plain_and_complete(name: str) -> None:
    state = aggregate(rows(J3), name, losses=L3).state
    assert set(state) == {"rule", "tasks", "step", "tensors", "buffers"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    before = copy.deepcopy(loaded)
    ours, theirs = (aggregate(rows(J3), name, losses=L3, state=s) for s in (state, loaded))
    assert torch.equal(ours.direction, theirs.direction)
    for part in ("tensors", "buffers"):
        for key, tensor in before[part].items():
            assert torch.equal(loaded[part][key], tensor)


@pytest.mark.parametrize("name", ["rlw", "pcgrad", "graddrop", "gradvac"])
def test_generator(name: str) -> None:
    jacobian = normal(6, 40, seed=1)
    draws = [
        aggregate(jacobian, name, generator=seeded(seed)).direction for seed in (1, 1, 2, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not all(torch.equal(draws[0], draw) for draw in draws[2:])
    generator = seeded(1)
    first, second = (aggregate(jacobian, name, generator=generator).direction for _ in range(2))
    assert torch.equal(first, draws[0])
    assert not torch.equal(first, second)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    for name in ALONE:
        aggregate(rows(J3), name, losses=L3)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("dtype", "tol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("name", WEIGHTED)
def test_narrow_types(name: str, dtype: torch.dtype, tol: float) -> None:
    jacobian = normal(4, 60, seed=3).to(dtype)
    losses = losses_for(4)
    ours = aggregate(jacobian, name, losses=losses)
    theirs = aggregate(jacobian.double(), name, losses=losses)
    assert ours.direction.dtype == dtype
    assert ours.weights is not None
    assert ours.weights.dtype == dtype
    gap = (ours.direction.double() - theirs.direction).norm()
    assert gap <= tol * theirs.direction.norm()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-8, 1e8, 1e16, 1e18])
@pytest.mark.parametrize("name", WEIGHTED)
def test_float32_of_any_size(name: str, scale: float) -> None:
    jacobian = normal(4, 60, seed=3)
    losses = losses_for(4)
    ours = aggregate((jacobian * scale).float(), name, losses=losses).direction.double()
    theirs = aggregate(jacobian * scale, name, losses=losses).direction
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", WEIGHTED)
def test_float32_with_norms_far_apart(name: str) -> None:
    norms = torch.tensor([[1e-6], [1.0], [1e6]], dtype=torch.float64)
    jacobian, losses = normal(3, 30, seed=5) * norms, losses_for(3)
    ours = aggregate(jacobian.float(), name, losses=losses)
    theirs = aggregate(jacobian, name, losses=losses)
    assert ours.weights is not None
    assert theirs.weights is not None
    scale = (theirs.weights.abs() * jacobian.norm(dim=1)).sum()
    assert (ours.direction.double() - theirs.direction).norm() <= 1e-4 * scale


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e18])
def test_elementwise_in_float32(name: str, scale: float) -> None:
    jacobian = (normal(4, 60, seed=3) * scale).float()
    direction = aggregate(jacobian, name, losses=losses_for(4)).direction
    assert direction.dtype == torch.float32
    assert direction.isfinite().all()


def test_public_names() -> None:
    for name in ("aggregate", "chain", "make_rule", "register", "rule_names", "MTLOptimizer"):
        assert callable(getattr(gradbal, name))
