"""``on_nonfinite``: raise and name the task, skip, or let it pass."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import ONE_BATCH, WEIGHTED
from models import Overflow, Toy, assert_same, everything, frozen_copy, grads, spoiled, wrapped
from torch import Tensor

from gradbal import MTLOptimizer
from gradbal.rules._base import Context, GradientRule, GramRule, LossRule, Rows, Rule
from gradbal.rules._registry import RULES

NAN, INF = float("nan"), float("inf")
ALL = pytest.mark.parametrize("rule", ONE_BATCH)
BY_GRADIENT = [name for name in ONE_BATCH if not issubclass(RULES[name].rule, LossRule)]
HINT = (
    " is not finite; nothing was changed. Leave a task without labels in this batch out of the "
    'mapping, or give None for it; or pass on_nonfinite="absent" to leave such tasks out, "skip" '
    "to leave such steps out. torch.autograd.set_detect_anomaly(True) shows the cause."
)


SPOILED = [  # rules on losses test the losses, unless gradients are formed for plain heads
    (rule, how, heads)
    for rule in ONE_BATCH
    for how in ("nan", "inf", "gradient")
    for heads in ("plain", None)
    if how != "gradient" or rule in BY_GRADIENT or heads
]


@pytest.mark.parametrize(("rule", "how", "heads"), SPOILED)
@pytest.mark.parametrize("first", [True, False])
def test_raise_names_the_task_and_changes_nothing(
    rule: str, how: str, first: bool, heads: str | None
) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, heads=heads)
    if not first:
        optimizer.step(model.named(0))
    before = everything(model, optimizer)
    what = "loss" if how != "gradient" and rule not in BY_GRADIENT else "gradient"
    with pytest.raises(ValueError, match=re.escape(f"MTLOptimizer: the {what} of task 'b'{HINT}")):
        optimizer.step(spoiled(model, 1, how))
    assert everything(model, optimizer) == before
    with pytest.raises(ValueError, match="of task 'b' is not finite"):
        optimizer.backward(spoiled(model, 1, how))
    assert everything(model, optimizer) == before
    optimizer.step(model.named(1))


def test_all_bad_tasks_are_named() -> None:
    model = Toy()
    losses = model.named()
    losses["a"], losses["c"] = losses["a"] * NAN, losses["c"] * INF
    with pytest.raises(
        ValueError, match=re.escape(f"MTLOptimizer: the gradient of task 'a', task 'c'{HINT}")
    ):
        wrapped(model, "upgrad").step(losses)


@ALL
def test_raising_after_the_first_step_goes_on_as_if_nothing_had_happened(rule: str) -> None:
    model, calm = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(calm, rule)
    for batch in range(4):
        if batch in (0, 2):
            with pytest.raises(ValueError, match="is not finite"):
                optimizer.step(spoiled(model, 9, "nan"))
        optimizer.step(model.named(batch))
        reference.step(calm.named(batch))
    assert frozen_copy(dict(model.state_dict())) == frozen_copy(dict(calm.state_dict()))
    assert frozen_copy(optimizer.state_dict()) == frozen_copy(reference.state_dict())


@ALL
@pytest.mark.parametrize("how", ["nan", "gradient"])
def test_skip_leaves_parameters_base_and_rule(rule: str, how: str) -> None:
    heads = "plain" if how == "gradient" else None  # rules on losses test the losses
    model = Toy()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = MTLOptimizer(base, rule, on_nonfinite="skip", heads=heads)
    optimizer.step(model.named(0))
    params = frozen_copy(dict(model.state_dict()))
    state = state_without_count(optimizer)
    assert optimizer.step(spoiled(model, 1, how)) is None
    assert grads(model) == [None] * 10
    assert frozen_copy(dict(model.state_dict())) == params
    assert state_without_count(optimizer) == state
    assert optimizer.core.skipped == 1
    assert optimizer.last is not None
    assert optimizer.last.skipped
    optimizer.backward(spoiled(model, 1, how))
    optimizer.step()
    assert frozen_copy(dict(model.state_dict())) == params
    assert state_without_count(optimizer) == state
    assert optimizer.core.skipped == 2
    optimizer.step(model.named(1))
    assert frozen_copy(dict(model.state_dict())) != params


def state_without_count(optimizer: MTLOptimizer) -> Any:
    state = frozen_copy(optimizer.state_dict())
    state["gradbal"]["step"][0].pop("skipped")
    return state


def test_skip_after_a_good_backward_takes_the_whole_step_back() -> None:
    model = Toy()
    optimizer = wrapped(model, "uw", on_nonfinite="skip")
    optimizer.step(model.named(0))
    params = frozen_copy(dict(model.state_dict()))
    learned = frozen_copy(optimizer.core.contents()["state"]["groups"])
    optimizer.backward(model.named(1))
    optimizer.backward(spoiled(model, 2, "nan"))
    optimizer.step()
    assert frozen_copy(dict(model.state_dict())) == params
    assert frozen_copy(optimizer.core.contents()["state"]["groups"]) == learned


@ALL
@pytest.mark.parametrize("heads", ["plain", None])
def test_propagate_writes_what_is_not_finite(rule: str, heads: str | None) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, on_nonfinite="propagate", heads=heads)
    optimizer.step(model.named(0))
    optimizer.zero_grad()
    optimizer.backward(spoiled(model, 1, "nan"))
    assert any(not g.isfinite().all() for g in grads(model.trunk) if g is not None)
    assert any(not g.isfinite().all() for g in grads(model.heads[1]) if g is not None)


@pytest.mark.parametrize("rule", BY_GRADIENT)
def test_propagate_keeps_the_state_of_rules_on_gradients(rule: str) -> None:
    """What a rule makes of NaN is NaN; it is not asked, so that its state stays."""
    model = Toy()
    optimizer = wrapped(model, rule, on_nonfinite="propagate")
    optimizer.step(model.named(0))
    before = frozen_copy(optimizer.core.contents()["state"])
    optimizer.backward(spoiled(model, 1, "gradient"))
    assert frozen_copy(optimizer.core.contents()["state"]["groups"]) == before["groups"]


@pytest.mark.parametrize("rule", WEIGHTED)
def test_reused_weights_test_the_losses(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, update_every=3)
    optimizer.step(model.named(0))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=re.escape(f"MTLOptimizer: the loss of task 'b'{HINT}")):
        optimizer.step(spoiled(model, 1, "nan"))
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("rule", BY_GRADIENT)
def test_heads_that_overflow_are_found(rule: str) -> None:
    """The test covers parameters that only one task reaches."""
    model = Toy()
    optimizer = wrapped(model, rule)
    before = everything(model, optimizer)
    losses = model.named()
    losses["c"] = losses["c"] + Overflow.apply(model.heads[2].bias.sum())
    with pytest.raises(
        ValueError, match=re.escape(f"MTLOptimizer: the gradient of task 'c'{HINT}")
    ):
        optimizer.step(losses)
    assert everything(model, optimizer) == before


@ALL
def test_a_failing_pass_changes_nothing(rule: str) -> None:
    """A step has cleared the old gradients, if it was in its only pass; they took up memory."""
    model = Toy()
    optimizer = wrapped(model, rule)
    optimizer.step(model.named(0))
    for step in (True, False):
        losses = model.named(1)
        torch.autograd.grad(losses["b"], list(model.trunk.parameters()))
        before = everything(model, optimizer)
        with pytest.raises(RuntimeError, match="is used up"):
            optimizer.step(losses) if step else optimizer.backward(losses)
        after = everything(model, optimizer)
        if step and rule not in BY_GRADIENT:
            assert grads(model) == [None] * 10
            before[1] = after[1]
        assert after == before


def test_a_rule_that_raises_changes_nothing() -> None:
    model = Toy()
    optimizer = wrapped(model, "gls")
    optimizer.step(model.named(0))
    before = everything(model, optimizer)
    losses = model.named(1)
    losses["b"] = losses["b"] - 100
    with pytest.raises(ValueError, match=r"^GLS: losses must be > 0, got .* for task 'b'"):
        optimizer.step(losses)
    assert everything(model, optimizer) == before


def test_overflow_of_the_gram_matrix_alone_is_no_overflow() -> None:
    """Gradients of 1e30 in single precision have squares beyond its range."""
    model = Toy().float()
    x = torch.ones(2, 4)
    optimizer = wrapped(model, "mgda", lr=0.0)
    optimizer.step([(y * 1e30).mean() for y in model(x)])
    assert all(g is not None and g.isfinite().all() for g in grads(model))
    large = grads(model.trunk)
    optimizer.step([y.mean() for y in model(x)])
    assert_same([g / 1e30 for g in large if g is not None], grads(model.trunk), 1e-4)


class BadGram(GramRule):
    """Divides by zero."""

    def weights(self, gram: Tensor, ctx: Context) -> Tensor:
        return gram.diagonal() / torch.tensor([1.0, 0.0, 1.0], dtype=gram.dtype)


class BadLosses(LossRule):
    """Returns NaN for one task."""

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        return losses * torch.tensor([1.0, NAN, 1.0], dtype=losses.dtype)


class BadDirection(GradientRule):
    """Overflows in one entry."""

    weighted = False

    def direction(self, grads: Rows, indices: Sequence[int], ctx: Context) -> list[Tensor]:
        return [
            torch.full_like(rows[0], INF if i == indices[0] else 0)
            for i, rows in zip(indices, grads, strict=True)
        ]


FAULTS = [
    (BadGram(), "a weight for task 'b'"),
    (BadLosses(), "a weight for task 'b'"),
    (BadDirection(), "a direction"),
]


@pytest.mark.parametrize(("rule", "what"), FAULTS)
def test_a_rule_that_returns_nan_is_named_and_changes_nothing(rule: Rule, what: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    before = everything(model, optimizer)
    name = type(rule).__name__
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"MTLOptimizer: {name} returned {what} that is not finite in step 0, although losses "
            "and task gradients are; nothing was changed. Check the options of the rule and the "
            'scale of the losses, or pass on_nonfinite="skip" to leave such steps out.'
        ),
    ):
        optimizer.step(model.named())
    assert everything(model, optimizer) == before


@pytest.mark.parametrize(("rule", "what"), FAULTS)
def test_a_rule_that_returns_nan_may_be_skipped_or_passed_on(rule: Rule, what: str) -> None:
    model = Toy()
    params = frozen_copy(dict(model.state_dict()))
    optimizer = wrapped(model, rule, on_nonfinite="skip")
    assert optimizer.step(model.named()) is None
    assert frozen_copy(dict(model.state_dict())) == params
    assert optimizer.core.skipped == 1
    wrapped(model, rule, on_nonfinite="propagate").step(model.named())
    assert not all(p.isfinite().all() for p in model.parameters())
