"""Streaming against Sequential: the same Gram matrices and directions, a piece at a time."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graph_cases import CASES, tolerance
from models import (
    Counted,
    Deep,
    Fixed,
    Inverse,
    NothingRead,
    Toy,
    assert_same,
    chooser,
    data,
    grads,
    jacobian,
    lone_rows,
    param,
    same_as_sequential,
    square,
    wrapped,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

from gradbal import aggregate, engines
from gradbal.graph.segments import split
from gradbal.lab.bench.measure import peaks

ENGINES = {
    "one by one": engines.Streaming(),
    "all at once": engines.Streaming(within=engines.Batched()),
    "chunks, factored": engines.Streaming(4, within=engines.Factored(chunk_size=2)),
}
each = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile


@pytest.fixture(autouse=True)
def smallest_pieces(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Cut wherever it can be done, unless a test asks otherwise; note the number of pieces."""
    counts: list[int] = []

    def cut(top: Any, index: Any, sizes: Any, limit: float) -> Any:
        limit = limit if "real_pieces" in request.fixturenames else 0
        counts.append(len(pieces := split(top, index, sizes, limit)))
        return pieces

    monkeypatch.setattr("gradbal.jacobian.engines.split", cut)
    return counts


@pytest.fixture
def real_pieces() -> None:
    """Leave the size of pieces to the engine."""


@pytest.mark.parametrize("name", ZOO)
@each
def test_zoo(name: str, engine: engines.Engine) -> None:
    model = ZOO[name]()
    same_as_sequential(list(model.parameters()), model.losses, engine)


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
@each
def test_graphs(build: Callable[[], Any], engine: engines.Engine) -> None:
    params, losses = build()
    same_as_sequential(params, losses, engine, tolerance(build))


def random_graph(seed: int) -> tuple[list[torch.nn.Parameter], Callable[[], list[Tensor]]]:
    """Products shared at random and meeting at random, far below where the tasks meet."""
    some = chooser(seed)
    weights = [param(3, 3, seed=seed * 10 + i) for i in range(6)]
    steps = [(some(i + 1, 2), some(6, 1)[0]) for i in range(10)]
    own = [param(3, seed=500 + i) for i in range(3)]

    def losses() -> list[Tensor]:
        nodes = [data(2, 3, seed=seed)]
        for sources, which in steps:
            nodes.append((sum(nodes[i] for i in sources) @ weights[which]).tanh())
        return [square(sum(nodes[-3:]) @ mine - k) for k, mine in enumerate(own)]

    return [*weights, *own], losses


@pytest.mark.parametrize("seed", range(30))
@each
def test_random_graphs(seed: int, engine: engines.Engine) -> None:
    same_as_sequential(*random_graph(seed), engine)


# ---------------------------------------------------------------------- pieces


@pytest.mark.parametrize(("engine", "count"), [(engines.Streaming(), 8), (engines.Streaming(2), 2)])
def test_pieces_are_as_small_as_asked(
    engine: engines.Engine, count: int, smallest_pieces: list[int], real_pieces: None
) -> None:
    model = Deep(4)
    same_as_sequential(list(model.parameters()), model.losses, engine)
    assert all(count <= found <= 2 * count for found in smallest_pieces)


def test_the_trunk_is_cut_where_it_is_narrow() -> None:
    model, width = Deep(4), 8
    flow = wrapped(model, "upgrad")._flow
    found = flow.descent.planner.plan(flow.reader.read(model.losses()), {})
    sizes = {number: flow.descent.params[number].numel() for number in found.trunk}
    pieces = split(found.cut, flow.descent.roles.index, sizes, 2 * (width * width + width))
    assert sorted(n for piece in pieces for n in piece.params) == sorted(found.trunk)
    assert [len(piece.bottom) for piece in pieces] == [1] * (len(pieces) - 1) + [0]
    assert len(pieces) == 4


def test_what_is_kept_does_not_grow_with_depth(real_pieces: None) -> None:
    kept = []
    for depth in (2, 8):
        model = Deep(depth)
        optimizer = wrapped(model, "upgrad", engine="streaming")
        optimizer.step(model.losses())
        descent = optimizer._flow.descent
        assert not descent.keep.blocks
        kept.append([len(rows) for rows in descent.workspace.kept.values()])
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_the_peak_does_not_grow_with_tasks_times_parameters(real_pieces: None) -> None:
    """Twice as deep, the step holds more parameters and states of the base, and no more rows."""

    def beyond(depth: int, engine: str) -> int:
        def make(name: str) -> Callable[[], object]:
            model = Deep(depth, width=64, n_tasks=8)
            optimizer = wrapped(model, name, engine=engine, lr=0.0)
            return lambda: optimizer.step(model.losses())

        plain, ours = peaks([lambda: make("ew"), lambda: make("upgrad")], torch.device("cpu"))
        return ours - plain

    row = 2 * 64 * 65 * 8  # bytes of one task's gradients of one level
    assert beyond(16, "streaming") - beyond(8, "streaming") < row
    assert beyond(16, "sequential") - beyond(8, "sequential") > 7 * 8 * row


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15, 1e18])
def test_gradients_of_any_length_in_single_precision(scale: float) -> None:
    """Inner products that would under- or overflow are found while the rows are there."""
    found = []
    for engine in ("streaming", "sequential"):
        model = Deep(2).float()
        losses = [loss.float() * scale for loss in model.losses()]
        optimizer = wrapped(model, Inverse(), engine=engine, heads="plain")
        optimizer.backward(losses)
        assert optimizer.last is not None
        found.append([gram / scale**2 for gram in optimizer.last.grams.values()])
    assert_same(*found, 1e-4)


def test_passes(real_pieces: None) -> None:
    """Each piece is passed once per task, and then once for all."""
    model, passes = Deep(3), []
    losses = model.losses()
    stack = [loss.grad_fn for loss in losses]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "AddmmBackward0":
            node.register_hook(lambda _, grads, node=node: passes.append((node, grads[0])))
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    wrapped(model, "upgrad", engine="streaming").backward(losses)
    worked = Counter(node for node, grad in passes if grad is not None)
    assert sorted(worked.values()) == [1] * 3 + [4] * 6


def test_a_checkpoint_within() -> None:
    model, plain = Deep(3), Deep(3)
    run = model.layers[2].forward
    model.layers[2].forward = lambda x: checkpoint(run, x, use_reentrant=False)
    for net in (model, plain):
        wrapped(net, "upgrad", engine="streaming").backward(net.losses())
    assert_same(grads(model), grads(plain), 1e-12)


# ---------------------------------------------------------------------- hooks


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize("name", [*ENGINES, "sequential", "batched", "factored", "representation"])
@pytest.mark.parametrize("function", [Twice.apply, torch.tanh], ids=["custom", "torch's own"])
@pytest.mark.parametrize("nested", [False, True])
def test_hooks_on_tensors_run_once(
    name: str, function: Callable[[Tensor], Tensor], nested: bool
) -> None:
    """At the cut, between pieces, and where what meets the cut lies below another edge of it."""
    model = Deep(3)

    def losses() -> list[Tensor]:
        tensors = [data(4, 8)]
        for i, layer in enumerate(model.layers):
            z = function(layer(tensors[-1]))
            z.register_hook(lambda grad, i=i: grad * (i + 2))
            tensors.append(z)
        tops = [tensors[-1] + (tensors[2] if nested and k else 0) for k in range(3)]
        return [square(head(top)) for head, top in zip(model.heads, tops, strict=True)]

    optimizer = wrapped(model, "upgrad", engine=ENGINES.get(name, name))
    assert max(optimizer.check(losses()).values()) <= 1e-12


@pytest.mark.parametrize("engine", ["sequential", "batched", "streaming", "representation"])
def test_hooks_that_act_on_some_gradients_only(engine: str) -> None:
    """The first task's gradient is small and passes as it is; the others are halved, once."""
    model, sizes = Deep(2), [1e-6, 1.0, 2.0]

    def losses() -> list[Tensor]:
        z = data(4, 8)
        for layer in model.layers:
            z = layer(z).tanh()
        z.register_hook(
            lambda grad: grad / 2 if engine == "batched" or grad.norm() > 1e-3 else None
        )
        return [s * square(head(z) - 1) for s, head in zip(sizes, model.heads, strict=True)]

    params = list(model.layers.parameters())
    for task in range(3):
        model.zero_grad()
        weights = tuple(float(i == task) for i in range(3))
        wrapped(model, Fixed(weights), engine=engine, heads="plain").backward(losses())
        wanted = torch.autograd.grad(losses()[task], params)
        assert_same([param.grad for param in params], list(wanted), 1e-12)


@pytest.mark.parametrize("engine", ["sequential", "streaming", "marks"])
def test_hooks_where_something_wanted_lies_below(engine: str) -> None:
    """A layer under the cut that is to get the plain sum, or a second module that is named."""
    model = Deep(3)

    def losses() -> list[Tensor]:
        z = data(4, 8)
        for i, layer in enumerate(model.layers):
            z = layer(z)
            z.register_hook(lambda grad, i=i: grad * (i + 2))
        return [square(head(z)) for head in model.heads]

    options: dict[str, Any] = {"engine": engine, "shared": model.layers[1:]}
    if engine == "marks":
        options = {"engine": engines.Representation(model.layers[5], model.layers[2])}
    optimizer = wrapped(model, "upgrad", **options)
    assert max(optimizer.check(losses()).values()) <= 1e-12


# ---------------------------------------------------------------------- chosen parameters


@pytest.mark.parametrize("engine", ["sequential", "batched", "factored", "streaming"])
@pytest.mark.parametrize("rule", ["upgrad", "mgda", "cagrad", "nash_mtl"])
def test_gram_over(engine: str, rule: str) -> None:
    """The weights are those of the chosen gradients, the direction is of all parameters."""
    model = Toy(3)
    optimizer = wrapped(model, rule, engine=engine, gram_over=model.trunk[2], scale="native")
    optimizer.backward(model.losses())
    assert optimizer.last is not None
    chosen = list(model.trunk[2].parameters())
    rows = lone_rows(model.losses(), list(model.parameters()))
    some = lone_rows(model.losses(), chosen)
    matrix = jacobian(some, chosen, [0, 1])
    assert_same(optimizer.last.grams.values(), [matrix @ matrix.T], 1e-12)
    weights = aggregate(matrix, rule).weights
    assert weights is not None
    assert_same([optimizer.last.weights], [weights], 1e-9)
    for i, parameter in enumerate(model.trunk.parameters()):
        wanted = sum(w * row[i] for w, row in zip(weights, rows, strict=True))
        assert_same([parameter.grad], [wanted], 1e-9)


def test_gram_over_all_is_what_there_would_be_without() -> None:
    model, plain = Toy(3), Toy(3)
    wrapped(model, "upgrad", gram_over=model).backward(model.losses())
    wrapped(plain, "upgrad").backward(plain.losses())
    assert_same(grads(model), grads(plain), 1e-12)


def test_gram_over_with_pieces_of_a_batch() -> None:
    model, plain = Toy(3), Toy(3)
    for net in (model, plain):
        optimizer = wrapped(net, "mgda", gram_over=net.trunk[2])
        if net is plain:
            optimizer.step(net.losses())
        else:
            for rows in (slice(3), slice(3, 6)):
                halves = [loss / 2 for loss in net.losses(rows=rows)]
                optimizer.backward(halves, accumulate=rows == slice(3))
            optimizer.step()
    assert_same(list(model.parameters()), list(plain.parameters()), 1e-12)


def test_gram_over_what_lies_beside_the_cut() -> None:
    """A scale that each head uses by itself is shared, though no trunk is above it."""
    scale, weight, own = (
        param(3, seed=1),
        param(4, 3, seed=2),
        [param(3, seed=5 + i) for i in (0, 1)],
    )

    def losses() -> list[Tensor]:
        z = (data(6, 4) @ weight).tanh()
        return [square((z * scale) @ mine - 1) for mine in own]

    params = [scale, weight, *own]
    optimizer = wrapped(params, "mgda", gram_over=scale, scale="native")
    optimizer.backward(losses())
    rows = lone_rows(losses(), params)
    weights = aggregate(jacobian(rows, params, [0]), "mgda").weights
    wanted = [sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in (0, 1)]
    assert_same([scale.grad, weight.grad], wanted, 1e-10)


def test_gram_over_only_goes_down_as_far_as_it_must() -> None:
    model, counted = Deep(3), Counted()
    z = counted.watch("first", model.layers[0](data(2, 8)))
    z = counted.watch("last", model.layers[1](z.tanh()))
    losses = [square(head(z)) for head in model.heads]
    wrapped(model, "upgrad", gram_over=model.layers[1]).backward(losses)
    assert counted.counts == {"first": 1, "last": 7}  # heads, passes below, and the one for all


# ---------------------------------------------------------------------- with everything else


@pytest.mark.parametrize("options", [{"engine": "streaming"}, {"gram_over": True}])
def test_scaler_and_what_is_not_finite(options: dict[str, Any]) -> None:
    for bad in (1.0, float("inf")):
        model = Toy(3)
        if "gram_over" in options:
            options = {"gram_over": model.trunk[2]}
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = wrapped(model, "upgrad", **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        optimizer.backward([loss * bad for loss in model.losses()], scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert same == (bad != 1.0)


def test_reused_weights_and_resuming() -> None:
    def run(engine: str, stop: int) -> list[Tensor]:
        model = Toy(3)
        optimizer = wrapped(model, "mgda", engine=engine, update_every=3)
        for i in range(8):
            if i == stop:
                state = optimizer.state_dict()
                optimizer = wrapped(model, "mgda", engine=engine, update_every=3)
                optimizer.load_state_dict(state)
            optimizer.step(model.losses(batch=i))
        return list(model.parameters())

    assert_same(run("streaming", 4), run("sequential", -1), 1e-10)


@pytest.mark.parametrize("options", [{"engine": "streaming"}, {"gram_over": True}])
def test_nothing_is_read_back(options: dict[str, Any]) -> None:
    model = Toy(3)
    if "gram_over" in options:
        options = {"gram_over": model.trunk[2]}
    optimizer = wrapped(model, "mgda", capturable=True, **options)
    optimizer.step(model.losses())
    losses = model.losses()
    with NothingRead():
        optimizer.step(losses)


def test_what_cannot_be() -> None:
    model = Toy(3)
    second = model.trunk[2]
    for rule, options, sentence in (
        ("graddrop", {"engine": "streaming"}, "GradDrop needs the gradients themselves"),
        ("mgda", {"engine": "streaming", "groups": "tensor"}, "Streaming gives one Gram matrix"),
        ("mgda", {"gram_over": second, "groups": "tensor"}, "`groups` asks for other"),
        ("graddrop", {"gram_over": second}, "GradDrop does not look at inner products"),
        ("uw", {"gram_over": second}, "UW does not look at inner products"),
        ("mgda", {"gram_over": second, "engine": "representation"}, "a representation has its own"),
        ("mgda", {"gram_over": nn.Linear(1, 1)}, "named in `shared`"),
    ):
        with pytest.raises(ValueError, match=sentence):
            wrapped(model, rule, **options)
    with pytest.raises(RuntimeError, match="share none of the parameters in `gram_over`"):
        wrapped(model, "mgda", gram_over=model.heads[0]).step(model.losses())
    with pytest.raises(ValueError, match="so batches cannot be compared"):
        wrapped(model, "modo", engine="streaming").step(model.losses(), model.losses(1))
    with pytest.raises(ValueError, match="`segments` must be >= 1"):
        engines.Streaming(0)
    with pytest.raises(TypeError, match="`within` must be Sequential"):
        engines.Streaming(within=engines.Representation())
