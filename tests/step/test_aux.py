"""Auxiliary losses: added after the rule, no tasks."""

import re
from typing import Any

import pytest
import torch
from models import Toy, assert_same, everything, grads, lone_rows, param, wrapped
from torch import Tensor

RULES = pytest.mark.parametrize("rule", ["ew", "uw", "upgrad", "nash_mtl", "mgda", "graddrop"])
ENGINES = pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
NAN = float("nan")


def penalty(model: Toy) -> Tensor:
    return model.trunk[0].weight.square().sum() + model.heads[1].bias.square().sum()


@RULES
@ENGINES
def test_gradient_is_that_of_the_rule_plus_that_of_aux(rule: str, engine: str) -> None:
    model, plain = Toy(), Toy()
    extra = param(3, seed=5)
    wrapped([*plain.parameters(), param(3)], rule, engine=engine).backward(plain.losses())
    params = [*model.parameters(), extra]
    optimizer = wrapped(params, rule, engine=engine)
    optimizer.backward(model.losses(), aux=penalty(model) + extra.square().sum())
    (beside,) = lone_rows([penalty(model) + extra.square().sum()], params)
    wanted = [
        a if b is None else b if a is None else a + b
        for a, b in zip([*grads(plain), None], beside, strict=True)
    ]
    assert_same(grads(params), wanted, 1e-12)
    assert_same([extra.grad], [2 * extra], 1e-12)


@RULES
def test_mapping_sequence_and_scalar_are_the_same(rule: str) -> None:
    found = []
    for form in range(3):
        model = Toy()
        one, two = penalty(model), model.losses(4)[2]
        aux: Any = [one + two, {"penalty": one, "entropy": two}, {"sum": one + two}][form]
        wrapped(model, rule).step(model.losses(), aux=aux)
        found.append(grads(model))
    assert_same(found[1], found[0], 1e-13)
    assert_same(found[2], found[0], 1e-13)


@RULES
def test_the_rule_does_not_see_aux(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(plain, rule)
    optimizer.backward(model.losses(), aux=model.trunk[0].weight.square().sum() * 1e3)
    reference.backward(plain.losses())
    assert optimizer.last is not None
    assert reference.last is not None
    if optimizer.last.weights is not None:
        assert torch.equal(optimizer.last.weights, reference.last.weights)
    ours, theirs = (o.core.contents()["tasks"] for o in (optimizer, reference))
    assert ours == theirs
    assert set(optimizer.metrics()) == set(reference.metrics())


def test_aux_never_enters_the_task_sets() -> None:
    """A head that one task and aux reach stays the head of that task."""
    model = Toy()
    optimizer = wrapped(model, "nash_mtl", heads="plain")
    optimizer.backward(model.losses(), aux=model.heads[0].weight.square().sum())
    sets = optimizer.core.contents()["tasks"]["sets"]
    assert sorted(sets.values()) == [1, 1, 2, 2, 4, 4, 7, 7, 7, 7]
    row = lone_rows(model.losses(), [model.heads[0].weight])[0][0]
    assert row is not None
    assert_same([model.heads[0].weight.grad], [row + 2 * model.heads[0].weight], 1e-12)


@RULES
def test_aux_that_shares_the_graph_of_a_task(rule: str) -> None:
    model, plain = Toy(), Toy()
    losses = model.losses()
    wrapped(model, rule).step(losses, aux=losses[0] * 2)
    optimizer = wrapped(plain, rule)
    fresh = plain.losses()
    optimizer.backward(fresh, aux=plain.losses()[0] * 2)
    assert_same(grads(model), grads(plain), 1e-12)


@RULES
def test_aux_without_graph_changes_nothing(rule: str) -> None:
    model, plain = Toy(), Toy()
    wrapped(model, rule).step(model.losses(), aux=torch.ones(()))
    wrapped(plain, rule).step(plain.losses())
    assert_same(model.parameters(), plain.parameters(), 0)


@RULES
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_aux_that_is_not_finite_is_named_and_changes_nothing(rule: str, value: float) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    optimizer.step(model.losses())
    before = everything(model, optimizer)
    with pytest.raises(
        ValueError, match="of the auxiliary loss is not finite; nothing was changed"
    ):
        optimizer.step(model.losses(1), aux=penalty(model) * value)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("rule", ["ew", "uw", "upgrad", "nash_mtl", "mgda"])
def test_aux_with_update_every(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = (
        wrapped(model, rule, update_every=3),
        wrapped(plain, rule, update_every=3),
    )
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch), aux=penalty(model))
        reference.zero_grad()
        reference.backward(plain.losses(batch))
        (beside,) = lone_rows([penalty(plain)], list(plain.parameters()))
        pairs = zip(grads(plain), beside, strict=True)
        assert_same(grads(model), [a if b is None else a + b for a, b in pairs], 1e-12)


def test_aux_without_losses_is_an_error() -> None:
    model = Toy()
    with pytest.raises(
        TypeError,
        match=re.escape(
            "MTLOptimizer: `aux` goes with losses, got it alone; pass it where the losses are."
        ),
    ):
        wrapped(model).step(aux=penalty(model))


@pytest.mark.parametrize("aux", [[1.0], {"a": 2}, "text", {"a": torch.ones(2)}])
def test_aux_must_be_losses(aux: Any) -> None:
    model = Toy()
    optimizer = wrapped(model)
    before = everything(model, optimizer)
    with pytest.raises((TypeError, ValueError)):
        optimizer.backward(model.losses(), aux=aux)
    assert everything(model, optimizer) == before
