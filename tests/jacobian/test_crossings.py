"""Sequential, Batched and Representation against lone passes on a zoo of modules."""

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from models import (
    Counted,
    Inverse,
    Pick,
    Toy,
    assert_same,
    data,
    everything,
    expected_grads,
    frozen_copy,
    grads,
    jacobian,
    lone_rows,
    wrapped,
)
from torch import Tensor, nn
from zoo import FALLS_BACK, ZOO, Leaves

from gradbal import engines
from gradbal.jacobian.loop import loop
from gradbal.jacobian.pull import Cotangent, Segment
from gradbal.jacobian.vmap import Batch
from gradbal.rules._base import Context, GradientRule

every = pytest.mark.parametrize("name", ZOO)
ENGINES = {
    "sequential": engines.Sequential(),
    "batched": engines.Batched(),
    "chunks": engines.Batched(chunk_size=2),
}
each = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)


@every
@each
def test_rows_are_those_of_lone_passes(name: str, engine: engines.Engine) -> None:
    model = ZOO[name]()
    shared = list(model.trunk.parameters())
    rows = lone_rows(model.losses(), shared)
    for task in range(3):
        optimizer = wrapped(model, Pick(task), scale="native", engine=engine)
        optimizer.backward(model.losses())
        zeros = [torch.zeros_like(p) for p in shared]
        wanted = [z if g is None else g for g, z in zip(rows[task], zeros, strict=True)]
        assert_same(grads(shared), wanted)
        optimizer.zero_grad()


@every
@each
def test_directions(name: str, engine: engines.Engine) -> None:
    model = ZOO[name]()
    params = list(model.parameters())
    for rule in ("ew", "upgrad"):
        wanted = expected_grads(model.losses(), params, rule)
        wrapped(model, rule, engine=engine).backward(model.losses())
        assert_same(grads(params), wanted, 1e-9)
        model.zero_grad()


@every
def test_a_batched_pass_says_once_that_it_cannot_be(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ZOO[name]()
    optimizer = wrapped(model, "upgrad", engine="batched", lr=1e-3)
    with caplog.at_level(logging.INFO, logger="gradbal"):
        for _ in range(3):
            optimizer.step(model.losses())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (name in FALLS_BACK)
    assert all(line.startswith("Batched: ") for line in lines)


@every
def test_buffers_are_updated_once(name: str) -> None:
    plain, ours = ZOO[name](), ZOO[name]()
    sum(plain.losses()).backward()
    wrapped(ours, "upgrad", engine="batched").backward(ours.losses())
    assert frozen_copy(dict(ours.named_buffers())) == frozen_copy(dict(plain.named_buffers()))


@every
def test_strides_and_layouts_are_those_of_the_parameters(name: str) -> None:
    plain, ours = ZOO[name](), ZOO[name]()
    sum(plain.losses()).backward()
    for engine in ("sequential", "batched", "representation"):
        wrapped(ours, "upgrad", engine=engine).backward(ours.losses())
        for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is None or theirs.grad is None:
                continue
            assert mine.grad.layout == theirs.grad.layout
            if not mine.grad.is_sparse:
                assert mine.grad.stride() == mine.stride()
        ours.zero_grad()


@every
def test_check_agrees(name: str) -> None:
    model = ZOO[name]()
    for engine in ENGINES.values():
        found = wrapped(model, "upgrad", engine=engine).check(model.losses())
        assert set(found) == {"0", "1", "2", "sum"}
        assert max(found.values()) <= 1e-10


# ---------------------------------------------------------------------- representation


def by_hand(
    losses: Sequence[Tensor], z: Sequence[Tensor], params: Sequence[Tensor], rule: Inverse
) -> tuple[Tensor, list[Tensor | None]]:
    """Rows with respect to z, flattened; weights from their Gram matrix; one pull."""
    rows = lone_rows(losses, z)
    for row in rows:
        row[:] = [torch.zeros_like(t) if g is None else g for g, t in zip(row, z, strict=True)]
    matrix = jacobian(rows, z, range(len(z)))
    gram = matrix @ matrix.T
    weights = rule.weights(gram, None)  # type: ignore[arg-type]  # needs no context
    pulled = torch.autograd.grad(
        sum(w * loss for w, loss in zip(weights, losses, strict=True)),
        params,
        retain_graph=True,
        allow_unused=True,
    )
    return gram, list(pulled)


@every
@pytest.mark.parametrize("named", [False, True])
def test_representation_is_what_one_would_do_by_hand(name: str, named: bool) -> None:
    model = ZOO[name]()
    seen: list[Tensor] = []
    run = model.run
    last = nn.Identity()
    model.run = lambda trunk, x: seen.append(last(run(trunk, x) * 1)) or seen[-1]
    losses = model.losses()
    # below the heads the three graphs meet in the pooled features, or in z itself
    z = seen[-1]
    flat = z.flatten(2).mean(dim=2) if z.ndim > 2 else z
    shared = list(model.trunk.parameters())
    rule = Inverse()
    if named:
        engine = engines.Representation(last)
        gram, wanted = by_hand(losses, [z], shared, rule)
    else:
        engine = engines.Representation()
        gram, wanted = by_hand(losses, [z], shared, rule)
        count = z[0, 0].numel() if z.ndim > 2 else 1
        gram = gram * count  # the mean spreads each gradient over as many places
        weights = rule.weights(gram, None)  # type: ignore[arg-type]  # needs no context
        total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
        wanted = list(torch.autograd.grad(total, shared, retain_graph=True, allow_unused=True))
    assert flat.shape[-1] == model.heads[0].in_features
    optimizer = wrapped(model, rule, engine=engine)
    optimizer.backward(model.losses())
    assert optimizer.last is not None
    assert_same([optimizer.last.grams["model"]], [gram])
    assert_same(grads(shared), wanted)


def test_representation_with_two_named_modules_and_parameters_beside_them() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    scale = nn.Parameter(torch.ones(3).double())  # shared, above the representation
    x = torch.linspace(-1, 1, 20).double().reshape(5, 4)
    own = [nn.Parameter(torch.full((3,), k + 0.5).double()) for k in range(2)]

    def losses(keep: list[Tensor] | None = None) -> list[Tensor]:
        u, v = a(x), b(x)
        if keep is not None:
            keep += [u, v]
        z = (u.tanh() + v.sin()) * scale
        return [(z * w).square().mean() + k * u.mean() for k, w in enumerate(own)]

    z: list[Tensor] = []
    rule = Inverse()
    shared = [*a.parameters(), *b.parameters(), scale]
    gram, wanted = by_hand(losses(z), z, shared, rule)
    optimizer = wrapped([*shared, *own], rule, engine=engines.Representation(a, b))
    optimizer.backward(losses())
    assert optimizer.last is not None
    assert_same([optimizer.last.grams["model"]], [gram])
    assert_same(grads(shared), wanted)


@dataclass(frozen=True)
class Agreed(GradientRule):
    """The sum where all tasks agree on the sign, else nothing."""

    def direction(self, grads: Any, indices: Any, ctx: Context) -> list[Tensor]:
        return [g.sum(dim=0) * ((g >= 0).all(dim=0) | (g <= 0).all(dim=0)) for g in grads]


@every
def test_elementwise_rules_work_on_the_representation(name: str) -> None:
    model = ZOO[name]()
    seen: list[Tensor] = []
    run, last = model.run, nn.Identity()
    model.run = lambda trunk, x: seen.append(last(run(trunk, x) * 1)) or seen[-1]
    losses = model.losses()
    stack = torch.stack([row[0] for row in lone_rows(losses, [seen[-1]]) if row[0] is not None])
    (agreed,) = Agreed().direction([stack], [0], Context(*[None] * 3))  # type: ignore[arg-type]
    shared = list(model.trunk.parameters())
    wanted = torch.autograd.grad(seen[-1], shared, agreed, allow_unused=True)
    optimizer = wrapped(model, Agreed(), engine=engines.Representation(last))
    optimizer.backward(model.losses())
    assert_same(grads(shared), wanted)


def three_inputs(model: Toy) -> list[Tensor]:
    return [model.losses(batch=k)[k] for k in range(3)]


def test_representation_of_several_inputs_pools_the_batch() -> None:
    model = Toy()
    found: list[Tensor] = []
    handle = model.trunk.register_forward_hook(lambda module, args, out: found.append(out))
    losses = three_inputs(model)
    handle.remove()
    rows = [
        torch.autograd.grad(loss, z, retain_graph=True)[0].sum(dim=0)
        for loss, z in zip(losses, found, strict=True)
    ]
    matrix = torch.stack(rows)
    weights = Inverse().weights(matrix @ matrix.T, None)  # type: ignore[arg-type]  # no context
    shared = list(model.trunk.parameters())
    wanted = torch.autograd.grad(
        sum(w * loss for w, loss in zip(weights, losses, strict=True)), shared
    )
    optimizer = wrapped(model, Inverse(), engine=engines.Representation(model.trunk, pool="batch"))
    optimizer.backward(three_inputs(model))
    assert optimizer.last is not None
    assert_same([optimizer.last.grams["model"]], [matrix @ matrix.T])
    assert_same(grads(shared), wanted)


def test_rules_on_norms_need_no_pooling() -> None:
    model = Toy()
    optimizer = wrapped(model, "gradnorm", engine=engines.Representation(model.trunk))
    optimizer.backward(three_inputs(model))
    assert all(p.grad is not None for p in model.parameters())


def test_representation_leaves_the_forward_pass_alone() -> None:
    model = Toy()
    plain = [float(loss.detach()) for loss in model.losses()]
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(model.trunk))
    losses = model.losses()
    assert [float(loss.detach()) for loss in losses] == plain
    sum(losses).backward()
    wanted = grads(model)
    optimizer.zero_grad()
    wrapped(model, "ew", engine=engines.Representation(model.trunk)).backward(model.losses())
    assert_same(grads(model), wanted)


def test_representation_of_a_module_that_is_called_twice_in_one_graph() -> None:
    layer, own = nn.Linear(3, 3).double(), nn.Parameter(torch.ones(3).double())
    x = torch.linspace(-1, 1, 6).double().reshape(2, 3)
    shared = list(layer.parameters())

    def losses(keep: list[Tensor] | None = None) -> list[Tensor]:
        inner = layer(x)
        outer = layer(inner.tanh())
        if keep is not None:
            keep += [outer, inner]
        return [(outer * own).square().mean(), (outer - 1).square().mean() + inner.mean()]

    z: list[Tensor] = []
    gram, wanted = by_hand(losses(z), z, shared, Inverse())
    optimizer = wrapped([*shared, own], Inverse(), engine=engines.Representation(layer))
    optimizer.backward(losses())
    assert optimizer.last is not None
    assert_same([optimizer.last.grams["model"]], [gram])
    assert_same(grads(shared), wanted)


@pytest.mark.parametrize("modules", [(), ("trunk",)])
def test_check_verifies_what_a_representation_pulls(modules: tuple[str, ...]) -> None:
    model = Toy()
    engine = engines.Representation(*(getattr(model, name) for name in modules))
    found = wrapped(model, "upgrad", engine=engine).check(model.named())
    assert set(found) == {"a", "b", "c", "sum"}
    assert max(found.values()) <= 1e-12


# ---------------------------------------------------------------------- the functions themselves


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 5])
def test_a_crossing_yields_every_task_once_in_order(chunk_size: int | None) -> None:
    weight = nn.Parameter(torch.eye(3).double())
    top = (torch.linspace(0, 1, 6).double().reshape(2, 3) @ weight).tanh()
    edge = torch.autograd.graph.get_gradient_edge(top)
    cotangents = [torch.full_like(top, k + 1.0) for k in range(5)]
    asked: list[int] = []

    def stream():
        for k, value in enumerate(cotangents):
            asked.append(k)
            yield Cotangent(k, [value], k == 4)

    crossing = Batch(chunk_size)
    found: dict[int, Tensor] = {}
    for rows in crossing(Segment((edge,), [weight], True), stream()):
        tasks = range(5)[rows.tasks] if isinstance(rows.tasks, slice) else [rows.tasks]
        (grad,) = rows.grads
        assert grad is not None
        found.update(zip(tasks, grad.reshape(-1, 3, 3), strict=True))
    assert list(found) == asked == [0, 1, 2, 3, 4]
    reference = loop(Segment((edge,), [weight], True), stream())
    assert_same(found.values(), [rows.grads[0] for rows in reference], 1e-14)


@pytest.mark.parametrize(("chunk_size", "retain_graph"), [(None, True), (2, False)])
def test_a_later_failure_is_made_good_while_there_is_a_graph(
    chunk_size: int | None, retain_graph: bool, caplog: pytest.LogCaptureFixture
) -> None:
    weight = nn.Parameter(torch.eye(3).double())
    crossing = Batch(chunk_size)
    for fails in (False, True, True):
        top = torch.linspace(0, 1, 6).double().reshape(2, 3) @ weight
        top = Leaves.apply(top) if fails else top.exp()
        edge = torch.autograd.graph.get_gradient_edge(top)
        stream = [Cotangent(k, [torch.full_like(top, k + 1.0)], k == 2) for k in range(3)]
        wanted = [row.grads[0] for row in loop(Segment((edge,), [weight], True), stream)]
        found: list[Tensor | None] = []
        for rows in crossing(Segment((edge,), [weight], retain_graph), stream):
            (grad,) = rows.grads
            assert isinstance(grad, Tensor)
            found += grad if isinstance(rows.tasks, slice) else [grad]
        assert_same(found, wanted, 1e-14)
    (line,) = caplog.messages
    assert line.startswith("Batched: going on one task at a time, because: ")


class Alone(torch.autograd.Function):
    """The identity; the backward pass cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(grad):
            raise RuntimeError("not in a batch.")
        return grad


def losses_through(model: Toy, operation: Callable[[Tensor], Tensor]) -> list[Tensor]:
    z = operation(model.trunk(data(6, 4))).exp()
    return [head(z).square().mean() for head in model.heads]


def test_what_cannot_be_batched_may_come_later(caplog: pytest.LogCaptureFixture) -> None:
    model, alone = Toy(), Toy()
    optimizer = wrapped(model, "upgrad", lr=1e-3, engine="batched")
    reference = wrapped(alone, "upgrad", lr=1e-3, engine="sequential")
    for operation in (lambda z: z, lambda z: z, Alone.apply, lambda z: z):
        optimizer.step(losses_through(model, operation))
        reference.step(losses_through(alone, operation))
    assert_same(model.parameters(), alone.parameters(), 1e-12)
    assert len([line for line in caplog.messages if "one task at a time" in line]) == 1


def test_a_failure_in_a_graph_that_looks_like_earlier_ones() -> None:
    """Its buffers are gone; nothing is changed, and the repeated step goes one by one."""
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine="batched")
    for _ in range(2):
        optimizer.step(losses_through(model, torch.tanh))
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="compute the losses again and repeat the step"):
        optimizer.step(losses_through(model, Alone.apply))
    assert everything(model, optimizer) == before
    optimizer.step(losses_through(model, Alone.apply))
    assert everything(model, optimizer) != before


def test_loop_takes_one_cotangent_at_a_time() -> None:
    weight = nn.Parameter(torch.eye(3).double())
    passes = Counted()
    top = passes.watch("trunk", torch.ones(2, 3).double() @ weight) * 2
    edge = torch.autograd.graph.get_gradient_edge(top)
    alive = 0

    def stream():
        nonlocal alive
        for k in range(3):
            alive += 1
            yield Cotangent(k, [torch.ones_like(top)], k == 2)

    for number, _ in enumerate(loop(Segment((edge,), [weight], False), stream())):
        assert alive == number + 1
    assert passes.counts == {"trunk": 3}
    with pytest.raises(RuntimeError, match="second time"):
        top.sum().backward()


def test_the_graph_survives_with_retain_graph() -> None:
    for engine in ENGINES.values():
        model = Toy()
        optimizer = wrapped(model, "upgrad", engine=engine)
        losses = model.losses()
        optimizer.backward(losses, retain_graph=True)
        once = grads(model)
        optimizer.backward(losses, retain_graph=True)
        assert_same(grads(model), [None if g is None else 2 * g for g in once], 1e-14)
        sum(losses).backward()


def test_a_named_module_is_left_as_it_was_when_the_optimizer_goes() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(model.trunk))
    optimizer.step(model.losses())
    assert len(model.trunk._forward_hooks) == 1
    del optimizer
    gc.collect()
    assert not model.trunk._forward_hooks
