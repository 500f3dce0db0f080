"""Auto: what it counts, what it chooses, and that a choice changes nothing but the time."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from models import Deep, Toy, assert_same, grads, square, wrapped
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradbal import engines
from gradbal._utils.torch_private import missing
from gradbal.graph import cost as work
from gradbal.jacobian import autotune as auto

SMALL = "Sequential()"


@pytest.fixture
def every_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "LITTLE", 0.0)
    monkeypatch.setattr(auto, "TIMED", 0.0)
    monkeypatch.setattr(auto, "CLEAR", 1e9)


class Clock:
    """A clock on which one engine's steps take three seconds and all others' two."""

    def __init__(self) -> None:
        self.now, self.slow, self.steps = 0.0, "", list[str]()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(auto, "perf_counter", found)
    stop = auto.Chooser.stop

    def stopping(self: auto.Chooser) -> None:
        if self.running is not None:
            name = self.running[1]
            found.steps.append(name)
            found.now += 3 if name == found.slow else 2
        stop(self)

    monkeypatch.setattr(auto.Chooser, "stop", stopping)
    return found


def used(optimizer: Any) -> engines.Engine:
    engine: engines.Engine = optimizer._flow.descent.planner.engine
    return engine


# ---------------------------------------------------------------------- counting


def counted(y: Tensor) -> work.Work:
    return work.count((get_gradient_edge(y),))


def test_products_are_counted_once_for_each_operand_that_needs_a_gradient() -> None:
    x = torch.randn(7, 5)
    assert counted(nn.Linear(5, 3)(x)).flops == 2 * 7 * 5 * 3
    assert counted(nn.Linear(5, 3)(x.requires_grad_())).flops == 2 * 2 * 7 * 5 * 3
    assert counted(nn.Linear(5, 3, bias=False)(x)).flops == 2 * 2 * 7 * 5 * 3
    a, b = torch.randn(4, 7, 5, requires_grad=True), torch.randn(4, 5, 3)
    assert counted(a @ b).flops == 2 * 4 * 7 * 5 * 3


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups: int) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=groups, bias=False)
    once = 2 * (2 * 6 * 5 * 5) * (4 // groups * 9)
    found = counted(layer(torch.randn(2, 4, 7, 7)))
    assert (found.flops, found.image_flops) == (0, once)
    both = counted(layer(torch.randn(2, 4, 7, 7, requires_grad=True)))
    assert both.image_flops == 2 * once
    layer.requires_grad_(requires_grad=False)
    assert counted(layer(torch.randn(2, 4, 7, 7, requires_grad=True))).image_flops == once


def test_nodes_and_entries() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    found = counted((x.tanh() + x).exp())
    assert (found.nodes, found.entries, found.largest) == (4, 18, 6)


def test_more_tasks_cost_more_and_batching_saves_nodes_only() -> None:
    many_nodes, much_work = work.Work(nodes=100), work.Work(nodes=1, flops=1e12)
    for some in (many_nodes, much_work):
        costs = [some.seconds(work.CPU, m, batched=False) for m in (2, 8)]
        assert costs[1] == pytest.approx(4 * costs[0])
    assert many_nodes.seconds(work.CPU, 8, batched=True) < costs[1]
    assert many_nodes.seconds(work.CPU, 8, batched=True) < many_nodes.seconds(
        work.CPU, 8, batched=False
    )
    assert much_work.seconds(work.CPU, 8, batched=True) >= 0.99 * costs[1]


def test_free_memory_is_known_or_none() -> None:
    free = work.free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20
    assert work.free_bytes(torch.device("meta")) is None


# ---------------------------------------------------------------------- choosing


def test_small_models_on_a_cpu_go_one_by_one() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    optimizer.step(model.losses())
    assert used(optimizer) == engines.Sequential()
    assert "too short to matter" in optimizer.explain(model.losses())


def test_models_that_are_not_large_are_counted_only(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that two runs of them are alike to the last bit."""
    monkeypatch.setattr(auto, "LITTLE", 0.0)
    model = Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    for _ in range(3):
        optimizer.step(model.losses())
    assert clock.steps == []
    assert "because counted" in optimizer.explain(model.losses())


@pytest.mark.parametrize("slow", ["Sequential()", "Batched()"])
def test_the_faster_of_two_stays(slow: str, clock: Clock, every_model_is_large: None) -> None:
    model, plain = Deep(2), Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    reference = wrapped(plain, "upgrad", engine="sequential", lr=0.01)
    clock.slow = slow
    assert "in the first steps" in optimizer.explain(model.losses())
    for _ in range(10):
        optimizer.step(model.losses())
        reference.step(plain.losses())
    assert sorted(clock.steps) == ["Batched()"] * 2 + ["Sequential()"] * 2  # 3 to 2 is clear
    fast = engines.Batched() if slow == "Sequential()" else engines.Sequential()
    assert used(optimizer) == fast
    assert f"because a step took 2000.0 ms, and 3000.0 ms with {slow}" in optimizer.explain(
        model.losses()
    )
    assert_same(list(model.parameters()), list(plain.parameters()), 1e-10)


def test_close_ones_get_one_more_round(clock: Clock, every_model_is_large: None) -> None:
    model = Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    for _ in range(10):
        optimizer.step(model.losses())
    assert sorted(clock.steps) == ["Batched()"] * 3 + ["Sequential()"] * 3


def test_what_is_settled_is_saved(clock: Clock, every_model_is_large: None) -> None:
    model = Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    clock.slow = "Sequential()"
    for _ in range(6):
        optimizer.step(model.losses())
    again = wrapped(model, "upgrad", engine="auto", lr=0.01)
    again.load_state_dict(optimizer.state_dict())
    clock.steps.clear()
    again.step(model.losses())
    assert used(again) == engines.Batched()
    assert clock.steps == []


def test_each_number_of_tasks_has_its_own(clock: Clock, every_model_is_large: None) -> None:
    model = Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    for _ in range(8):
        optimizer.step(dict(zip("abc", model.losses(), strict=True)))
    for _ in range(8):
        optimizer.step(dict(zip("ab", model.losses(), strict=False)))
    assert len(optimizer.core.choice) == 2
    assert len(clock.steps) == 12


def test_a_step_that_fails_is_not_timed(clock: Clock, every_model_is_large: None) -> None:
    model = Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    for factor in (float("nan"), 1.0):
        losses = [loss * factor for loss in model.losses()]
        if factor == 1.0:
            optimizer.step(losses)
        else:
            with pytest.raises(ValueError, match="not finite"):
                optimizer.step(losses)
    assert len(clock.steps) == 1


@pytest.mark.parametrize("how", ["capturable", "deterministic"])
def test_what_must_not_be_timed_is_counted(
    how: str, clock: Clock, every_model_is_large: None, deterministic: None
) -> None:
    torch.use_deterministic_algorithms(how == "deterministic")
    model = Deep(2)
    optimizer = wrapped(model, "upgrad", engine="auto", capturable=how == "capturable")
    for _ in range(3):
        optimizer.step(model.losses())
    assert clock.steps == []
    assert "because counted" in optimizer.explain(model.losses())


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Put torch's setting back."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def test_large_clear_counts_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small operations and tasks: several tasks at once save nearly all of the launches."""
    monkeypatch.setattr(auto, "LITTLE", 0.0)
    model = Deep(20, n_tasks=16)
    optimizer = wrapped(model, "upgrad", engine="auto", lr=0.01)
    optimizer.step(model.losses())
    assert used(optimizer) == engines.Batched()


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_products_are_chosen_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "LITTLE", 0.0)
    trunk = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    heads = [nn.Linear(512, 1) for _ in range(4)]
    x, params = torch.randn(8, 512), [*trunk.parameters()]

    def losses() -> list[Tensor]:
        z = trunk(x)
        return [square(head(z)) for head in heads]

    weights = wrapped(params, "upgrad", engine="auto", lr=0.01)
    weights.step(losses())
    assert isinstance(used(weights), engines.Factored)
    entries = wrapped(params, "graddrop", engine="auto", lr=0.01)
    entries.step(losses())
    assert isinstance(used(entries), engines.Sequential | engines.Batched)


def test_streams_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "free_bytes", lambda device: 100)
    streaming = engines.Streaming(within=engines.Factored())
    for rule, options, wanted in (
        ("upgrad", {}, streaming),
        ("graddrop", {}, engines.Sequential()),
        ("upgrad", {"groups": "tensor"}, engines.Sequential()),
    ):
        model, plain = Deep(2), Deep(2)
        optimizer = wrapped(model, rule, engine="auto", **options)
        optimizer.step(model.losses())
        assert used(optimizer) == wanted
        wrapped(plain, rule, engine="sequential", **options).step(plain.losses())
        assert_same(list(model.parameters()), list(plain.parameters()), 1e-10)


def test_pieces_of_a_batch_are_kept_after_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "free_bytes", lambda device: 100)
    model, plain = Toy(3), Toy(3)
    for net, engine in ((model, "auto"), (plain, "sequential")):
        optimizer = wrapped(net, "upgrad", engine=engine)
        optimizer.step(net.losses())
        halves = cycle([slice(3), slice(3, 6)])
        for accumulate in (True, False):
            losses = [loss / 2 for loss in net.losses(rows=next(halves))]
            optimizer.backward(losses, accumulate=accumulate)
    assert_same(grads(model), grads(plain), 1e-10)


def test_every_name_is_how_an_engine_is_written() -> None:
    for name, engine in auto.ENGINES.items():
        assert eval(name, vars(engines)) == engine
