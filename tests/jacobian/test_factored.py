"""Factored against Sequential: the same Gram matrices and gradients, with fewer of them formed."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graph_cases import CASES, tolerance
from layer_cases import ODD
from models import (
    Counted,
    Fixed,
    NothingRead,
    Toy,
    assert_same,
    chooser,
    data,
    fill,
    grads,
    param,
    same_as_sequential,
    says,
    square,
    wrapped,
)
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo import ROWS, ZOO, Three

from gradbal import engines
from gradbal._utils.torch_private import missing
from gradbal.jacobian.layers import Layer
from gradbal.jacobian.pull import Segment

L = nn.Linear
FINDER: Any = importlib.import_module("gradbal.jacobian.factored")  # the package's is the function
ENGINES = {
    "one by one": engines.Factored(),
    "all at once": engines.Factored(chunk_size=None),
    "chunks": engines.Factored(chunk_size=2),
}
each = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # of torch.compile
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Factor whatever can be, and note how many parameters are in each segment."""
    counts: list[int] = []
    find = FINDER.find_layers

    def finding(segment: Segment, n_tasks: int) -> dict[int, Layer]:
        layers = find(segment, n_tasks)
        counts.append(len(layers))
        return layers

    monkeypatch.setattr("gradbal.jacobian.engines.find_layers", finding)
    if "by_count" not in request.fixturenames:
        monkeypatch.setattr(FINDER, "worthwhile", lambda uses, n_tasks, size=None: True)
        monkeypatch.setattr(FINDER, "CALLS", 0)
    return counts


@pytest.fixture
def by_count() -> None:
    """Leave the choice to the count of operations."""


# ---------------------------------------------------------------------- what is found

PRODUCTS = {  # of the trunk's parameters; biases, norms and what is not listed are formed
    **dict.fromkeys([name for name in ZOO if "norm" in name], 1),
    **dict.fromkeys([name for name in ZOO if name.startswith("conv")], 2),
    **dict.fromkeys(["conv, one dimension", "transposed conv", "scaled dot product attention"], 1),
    **dict.fromkeys(["max pool", "adaptive pool", "upsample", "softmax", "mish", "embedding"], 1),
    **dict.fromkeys(["sparse embedding under a dense layer", "a layer used three times"], 1),
    **dict.fromkeys(["in-place operations", "index operations", "fft", "solving"], 1),
    **{"linear": 2, "dropout": 2, "attention": 2, "transformer layer": 4, "lstm": 2, "gru": 4},
    **{"rnn, two ways": 4, "function in numpy": 1, "weight norm": 0, "spectral norm": 0},
}


@pytest.mark.parametrize("name", ZOO)
@each
def test_zoo(name: str, engine: engines.Engine, counted: list[int]) -> None:
    model = ZOO[name]()
    same_as_sequential(list(model.parameters()), model.losses, engine)
    assert set(counted) == {PRODUCTS.get(name, 0)}


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
@each
def test_graphs(build: Callable[[], Any], engine: engines.Engine) -> None:
    params, losses = build()
    same_as_sequential(params, losses, engine, tolerance(build))


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs(seed: int, counted: list[int]) -> None:
    """Products, turned and shared at random, and meeting at random."""
    some = chooser(seed)
    weights = [param(3, 3, seed=seed * 10 + i) for i in range(4)]
    steps = [(some(i + 1, 2), some(4, 1)[0], some(5, 1)[0]) for i in range(8)]
    uses = [some(9, 2) for _ in range(3)]

    def losses() -> list[Tensor]:
        nodes = [data(2, 3, seed=seed)]
        for sources, which, how in steps:
            x, w = sum(nodes[i] for i in sources), weights[which]
            y = [x @ w, F.linear(x, w), (w @ x.T).T, (w.T @ x.T).T, x * w.sum(dim=0)][how]
            nodes.append(y.tanh())
        return [sum(square(nodes[i] - k) for i in use) for k, use in enumerate(uses)]

    if any(loss.requires_grad for loss in losses()):
        same_as_sequential(weights, losses, engines.Factored())


VOLUME = data(2, 4, 5, 6, 7, seed=1)
FOUR = {
    "image": VOLUME[:, :, 0],
    "channels last": VOLUME[:, :, 0].contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"dilation": 2}])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("x", [VOLUME[:, :, 0, 0], *FOUR.values(), VOLUME], ids=lambda x: x.ndim)
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(
    options: dict[str, int], groups: int, x: Tensor, transposed: bool, counted: list[int]
) -> None:
    kind = f"Conv{'Transpose' if transposed else ''}{x.ndim - 2}d"
    if transposed and "stride" in options:
        options = {**options, "output_padding": 1}
    build = getattr(nn, kind)
    model = Three(build(4, 6, 2, groups=groups, **options), x, 6)
    same_as_sequential(list(model.parameters()), model.losses, engines.Factored())
    assert set(counted) == {1}


@pytest.mark.parametrize(("build", "count"), ODD.values(), ids=ODD)
@each
def test_uses(
    build: Callable[[], Three], count: int, engine: engines.Engine, counted: list[int]
) -> None:
    model = build()
    same_as_sequential(list(model.parameters()), model.losses, engine)
    assert set(counted) == {count}


def test_a_hook_on_a_parameter_is_run(counted: list[int]) -> None:
    model = Toy()
    model.trunk[0].weight.register_hook(lambda grad: grad * 3)
    same_as_sequential(list(model.parameters()), model.losses, engines.Factored())
    assert set(counted) == {1}


@each
def test_a_hook_on_the_output_of_a_layer_at_the_cut_is_run_once(
    engine: engines.Engine, counted: list[int]
) -> None:
    weight, heads = param(4, 5, seed=1), [param(5, seed=2), param(5, seed=3)]

    def losses() -> list[Tensor]:
        z = data(6, 4) @ weight
        z.register_hook(lambda grad: 3 * grad)
        return [square(z @ head - 1) for head in heads]

    same_as_sequential([weight, *heads], losses, engine)
    assert set(counted) == {1}
    wanted = torch.autograd.grad(losses()[0], weight)
    wrapped([weight, *heads], Fixed((1.0, 0.0)), engine=engine, heads="plain").backward(losses())
    assert_same([weight.grad], list(wanted), 1e-12)


TURNED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "convolution": ((4, 6, 3), lambda w: F.conv1d(data(2, 4, 9), w.transpose(0, 1))),
    "table": ((4, 6), lambda w: F.embedding(torch.tensor([0, 3, 3]), w.T)),
    "four axes": ((1, 1, 6, 4), lambda w: ROWS.view(1, 5, 1, 6) @ w),
    "another shape": ((4, 6), lambda w: ROWS @ w.view(6, 4)),
}


@pytest.mark.parametrize(("shape", "use"), TURNED.values(), ids=TURNED)
def test_what_is_made_of_a_weight_is_not_the_weight(
    shape: tuple[int, ...], use: Callable[[Tensor], Tensor], counted: list[int]
) -> None:
    w = param(*shape, seed=1)

    def losses() -> list[Tensor]:
        z = use(w).tanh()
        return [square(z), square(z - 1)]

    same_as_sequential([w], losses, engines.Factored())
    assert set(counted) == {0}


@pytest.mark.parametrize("times", [1, 2])
def test_a_product_with_a_factor(times: int, counted: list[int]) -> None:
    w, b, x = param(4, 4, seed=1), param(4, seed=2), data(5, 4)

    def losses() -> list[Tensor]:
        z = torch.addmm(b, x, w, alpha=times)
        return [square(z), square(z.tanh() - 1)]

    same_as_sequential([w, b], losses, engines.Factored())
    assert set(counted) == {int(times == 1)}


def test_a_weight_that_one_task_reaches_another_way(counted: list[int]) -> None:
    w, x = param(4, 4, seed=1), data(5, 4)

    def losses() -> list[Tensor]:
        z = (x @ w).tanh() @ w
        return [square(z), square(z - 1) + w.sum(), square(z + 1)]

    same_as_sequential([w], losses, engines.Factored())
    assert set(counted) == {0}


@each
def test_autocast(engine: engines.Engine, counted: list[int]) -> None:
    """What is saved is bfloat16; so are cotangents, but not their inner products."""
    torch.manual_seed(0)
    trunk = nn.Sequential(L(6, 8), nn.ReLU(), L(8, 8), nn.ReLU(), L(8, 5))
    heads = nn.ModuleList(L(5, 2) for _ in range(3))
    model = nn.ModuleList([trunk, heads])

    def losses() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            z = trunk(ROWS.float())
            return [square(head(z).float() - k) for k, head in enumerate(heads)]

    same_as_sequential(list(model.parameters()), losses, engine, 2e-2)
    assert set(counted) == {3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = Toy().to(dtype)
    x = data(6, 4, dtype=dtype)
    tol = 1e-5 if dtype == torch.float32 else 3e-2
    same_as_sequential(
        list(model.parameters()), lambda: [square(y) for y in model(x)], engines.Factored(), tol
    )


@pytest.mark.parametrize("slots", [{}, {2: "_saved_by_another_name"}], ids=["none", "another"])
def test_a_torch_that_saves_otherwise(
    slots: dict[int, str], counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not found is formed."""
    monkeypatch.setitem(FINDER.SAVED, "AddmmBackward0", slots)
    model = Toy()
    same_as_sequential(list(model.parameters()), model.losses, engines.Factored())
    assert set(counted) == {0}


def test_compiled_trunk(counted: list[int]) -> None:
    torch._dynamo.reset()
    model = Toy()
    run = torch.compile(model.trunk, backend="aot_eager")
    last = L(5, 5).double()  # after the compiled region, so it is met first

    def losses() -> list[Tensor]:
        z = last(run(data(6, 4)))
        return [square(head(z) - k) for k, head in enumerate(model.heads)]

    same_as_sequential([*model.parameters(), *last.parameters()], losses, engines.Factored())
    assert set(counted) == {1}


# ---------------------------------------------------------------------- counts


class Watched(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.passes = Counted()

    def forward(self, x: Tensor) -> list[Tensor]:
        inner = self.passes.watch("trunk", self.trunk[0](x))
        z = self.trunk[2](inner.tanh()).tanh()
        return [head(z) for head in self.heads]


@pytest.mark.parametrize(("engine", "wanted"), list(zip(ENGINES.values(), [3, 1, 2], strict=True)))
def test_passes_and_formed_gradients(
    engine: engines.Engine, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many passes as without, no further one, and each weight's gradient formed once.

    In the first step products are compared with the gradients that autograd forms.
    """
    formed: list[torch.Size] = []
    gradient = Layer.gradient

    def forming(layer: Layer, cotangents: Sequence[Tensor | None]) -> Tensor:
        formed.append(layer.param.shape)
        return gradient(layer, cotangents)

    monkeypatch.setattr(Layer, "gradient", forming)
    model = Watched()
    optimizer = wrapped(model, "upgrad", engine=engine)
    for step in range(3):
        if step == 1:
            formed.clear()
        optimizer.step(model.losses())
        assert model.passes.counts == {"trunk": wanted * (step + 1)}
    weights = [model.trunk[0].weight.shape, model.trunk[2].weight.shape]
    assert sorted(formed) == sorted(weights * 2)
    keep = optimizer._flow.descent.keep
    assert sum(block.rows.shape[1] for block in keep.blocks) == 5 + 5  # the biases


def test_a_checkpoint_is_not_unpacked_to_look_at_it() -> None:
    model, calls = Toy(), 0

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model.trunk(x)

    def losses() -> list[Tensor]:
        z = checkpoint(run, data(6, 4), use_reentrant=False)
        return [square(head(z)) for head in model.heads]

    wrapped(model, "upgrad", engine="factored").step(losses())
    assert calls == 1 + 3  # as often as the graph is gone through


def test_nothing_of_a_step_is_kept() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine="factored")
    losses = model.losses()
    optimizer.step(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()
    assert optimizer._flow.descent.keep.sparse == {0: [], 2: []}


@pytest.mark.usefixtures("by_count")
def test_a_real_choice(counted: list[int]) -> None:
    """A wide layer and a table are products, a narrow layer is not; and all agrees."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Embedding(20_000, 8), L(32, 512), L(512, 512), L(512, 4), L(512, 4)])
    words = torch.randint(20_000, (16, 4))

    def losses() -> list[Tensor]:
        table, first, second, *heads = model
        z = second(first(table(words).flatten(1)).relu()).relu()
        return [square(head(z) - k) for k, head in enumerate(heads)]

    same_as_sequential(list(model.parameters()), losses, engines.Factored(), 1e-5)
    assert set(counted) == {2}
    text = wrapped(model, engine="factored").explain(losses())
    kept = (32 * 512 + 512 + 512 + 16 * 512 + 16 * 4 * 8) * 4 / 2**20
    assert text.endswith(
        "A step costs 2 passes through the trunk, forms the gradients of 422,144 parameters in 2 "
        f"tensors once and keeps 2 x {kept:.1f} MiB of task gradients."
    )


def test_a_parameter_that_gets_nothing(counted: list[int]) -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    w, x = param(4, 4, seed=1), data(5, 4)
    own = [param(4, seed=k + 2) for k in range(2)]

    def losses() -> list[Tensor]:
        z = Nothing.apply(x @ w)
        return [square(z + o) for o in own]

    same_as_sequential([w, *own], losses, engines.Factored())
    assert set(counted) == {1}


# ---------------------------------------------------------------------- the rest of the library


OPTIONS = {
    "groups": {"groups": "tensor"},
    "unscaled": {"scale": "native"},
    "capturable": {"capturable": True},
    "reused weights": {"update_every": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each
def test_options(options: dict[str, Any], engine: engines.Engine) -> None:
    model = Toy()
    same_as_sequential(list(model.parameters()), model.losses, engine, **options)


@pytest.mark.parametrize("rule", ["graddrop", "upgrad", "gradnorm", "uw", "pcgrad", "imtl"])
@each
def test_steps_are_the_same(rule: str, engine: engines.Engine) -> None:
    models = Toy(), Toy()
    pair = [wrapped(m, rule, engine=e) for m, e in zip(models, ("sequential", engine), strict=True)]
    for batch in range(4):
        for model, optimizer in zip(models, pair, strict=True):
            if batch < 2:
                optimizer.step(model.losses(batch))
            else:
                optimizer.zero_grad()
                optimizer.backward([x / 2 for x in model.losses(batch)], accumulate=True)
                optimizer.backward([x / 2 for x in model.losses(batch + 5)])
                optimizer.step()
    assert_same(models[1].parameters(), list(models[0].parameters()), 1e-9)


def test_nothing_is_read_back() -> None:
    words = torch.randint(9, (6, 1))
    model = fill(nn.ModuleList([nn.Embedding(9, 4), *(L(4, 2) for _ in range(3))]))
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        optimizer = wrapped(model, "upgrad", engine="factored", capturable=True)
        for _ in range(2):
            z = model[1](model[0](words)[:, 0]).tanh()
            losses = [square(z - 1), square(z)]
            with NothingRead():
                optimizer.step(losses)


def test_the_graph_survives_with_retain_graph() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine="factored")
    losses = model.losses()
    optimizer.backward(losses, retain_graph=True)
    once = grads(model)
    optimizer.backward(losses, retain_graph=True)
    assert_same(grads(model), [None if g is None else 2 * g for g in once], 1e-14)
    sum(losses).backward()


def test_scaler() -> None:
    model, plain = Toy(), Toy()
    scaler = GradScaler("cpu", init_scale=2.0**16)
    optimizer = wrapped(model, "upgrad", engine="factored")
    optimizer.backward(model.losses(), scaler=scaler)
    scaler.unscale_(optimizer)
    wrapped(plain, "upgrad").backward(plain.losses())
    assert_same(grads(model), grads(plain))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_what_is_not_finite_is_told(bad: float) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine="factored")
    losses = model.named()
    losses["b"] = losses["b"] * bad
    with pytest.raises(ValueError, match="the gradient of task 'b' is not finite"):
        optimizer.step(losses)


def test_bad_options() -> None:
    says(
        ValueError,
        "Factored: `chunk_size` must be >= 1, got 0.",
        lambda: engines.Factored(chunk_size=0),
    )


def test_a_torch_that_does_not_show_hooks_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Gradients are formed then: exact, with nothing gained, and never silently so."""
    unknown = "torch 2.7.0 does not show whether a saved tensor has hooks"
    monkeypatch.setattr("gradbal._utils.torch_private.missing", lambda: unknown)
    model, alone = Toy(), Toy()
    optimizer = wrapped(model, "upgrad", engine="factored")
    for _ in range(2):
        optimizer.step(model.losses())
        wrapped(alone, "upgrad", engine="sequential").step(alone.losses())
    assert_same(grads(model), grads(alone), 1e-12)
    assert caplog.messages == [
        f"Factored: task gradients are formed one by one, as with Sequential, because {unknown}."
    ]
