"""``capturable=True``: a step reads nothing back from the device."""

import re
from typing import Any

import pytest
import torch
from cases import ONE_BATCH, keeps_gradients
from models import NothingRead, Toy, assert_same, grads, wrapped
from torch.utils._python_dispatch import TorchDispatchMode

from gradbal import MTLOptimizer, make_rule

aten = torch.ops.aten
ALL = pytest.mark.parametrize("rule", ONE_BATCH)
PAIRS = [
    (engine, rule)
    for engine in ("sequential", "batched", "representation")
    for rule in ONE_BATCH
    if engine != "representation" or not keeps_gradients(make_rule(rule))  # else refused
]


@pytest.mark.parametrize(("engine", "rule"), PAIRS)
@pytest.mark.parametrize("heads", ["plain", None])
def test_nothing_is_read_back(rule: str, engine: str, heads: str | None) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, engine=engine, heads=heads, capturable=True)
    for batch in range(2):
        losses = model.losses(batch)
        with NothingRead():
            optimizer.step(losses)
    losses = model.losses(2)
    with NothingRead():
        optimizer.backward(losses)
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rule", sorted({*ONE_BATCH} - {"graddrop"}))  # draws differently
def test_the_same_gradients_as_without(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule, capturable=True), wrapped(plain, rule)
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch))
        reference.zero_grad()
        reference.backward(plain.losses(batch))
        assert_same(grads(model), grads(plain), 1e-6)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("options", [{"update_every": 2}, {"groups": "tensor", "heads": "plain"}])
def test_options(options: dict[str, Any]) -> None:
    model, plain = Toy(), Toy()
    optimizer = wrapped(model, "upgrad", capturable=True, **options)
    reference = wrapped(plain, "upgrad", **options)
    for batch in range(4):
        losses = model.losses(batch)
        with NothingRead():
            optimizer.step(losses)
        reference.step(plain.losses(batch))
    assert_same(model.parameters(), plain.parameters(), 1e-6)


def test_absent_tasks_accumulation_and_auxiliary_losses() -> None:
    model = Toy()
    optimizer = wrapped(model, "mgda", capturable=True)
    for names in ("abc", "ac", "b", "abc"):
        losses = {k: v for k, v in model.named().items() if k in names}
        aux = model.trunk[0].weight.square().sum()
        with NothingRead():
            optimizer.step(losses, aux=aux)
    pieces = [model.losses(k) for k in range(2)]
    with NothingRead():
        optimizer.backward(pieces[0], accumulate=True)
        optimizer.backward(pieces[1])
        optimizer.step()


@ALL
@pytest.mark.parametrize("capturable", [True, False])
def test_metrics_are_not_read_before_their_reader_does(rule: str, capturable: bool) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, capturable=capturable)
    optimizer.step(model.losses())
    with NothingRead():
        metrics = optimizer.metrics()
    assert {type(value) for value in metrics.values()} == {torch.Tensor}
    with pytest.raises(AssertionError, match="reads back"), NothingRead():
        metrics["gradbal/loss/0"].item()


def test_what_is_not_finite_is_passed_on() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", capturable=True)
    losses = model.losses()
    losses[1] = losses[1] * float("nan")
    optimizer.backward(losses)
    assert not all(g.isfinite().all() for g in grads(model) if g is not None)


@pytest.mark.parametrize("option", ["raise", "skip"])
def test_looking_at_what_is_not_finite_is_refused(option: str) -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(
            "MTLOptimizer: with `capturable` nothing is read back, so "
            f"on_nonfinite={option!r} cannot be; leave it out."
        ),
    ):
        wrapped(Toy(), "upgrad", capturable=True, on_nonfinite=option)


def test_default_makes_one_trip_to_the_host() -> None:
    """Without ``capturable`` all that the host looks at comes in one copy.

    A rule that works entry by entry costs one more: whether its direction is finite.
    """
    trips = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            if func is aten._local_scalar_dense.default:
                trips.append(func)
            return func(*args, **(kw or {}))

    for rule in ("graddrop", "pcgrad", "gradnorm"):
        model = Toy()
        optimizer = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), rule)
        optimizer.step(model.losses())
        losses = model.losses(1)
        trips.clear()
        with Count():
            optimizer.step(losses)
        assert len(trips) == (rule == "graddrop")  # all else leaves by tolist() of the one copy
