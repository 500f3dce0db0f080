"""Models that are compiled, wholly or in part."""

import logging
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from models import Toy, assert_same, data, expected_grads, grads, square, wrapped
from torch import Tensor

from gradbal import engines

pytestmark = pytest.mark.filterwarnings(  # torch's own, within torch
    "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf"
)


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(trunk_only: bool) -> tuple[Toy, torch.nn.Module]:
    model = Toy()
    if trunk_only:
        model.trunk.forward = torch.compile(model.trunk.forward, backend="aot_eager")
        return model, model
    return model, torch.compile(model, backend="aot_eager")


def losses(model: torch.nn.Module) -> list[Tensor]:
    return [square(y - k) for k, y in enumerate(model(data(6, 4)))]


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_compiled_trunk(engine: str, caplog: pytest.LogCaptureFixture) -> None:
    model, run = compiled(trunk_only=True)
    plain = Toy()
    wanted = expected_grads(losses(plain), list(plain.parameters()), "upgrad")
    optimizer = wrapped(model, "upgrad", engine=engine, lr=0.0)
    with caplog.at_level(logging.INFO, logger="gradbal"):
        for _ in range(2):
            optimizer.step(losses(run))
    assert_same(grads(model), wanted, 1e-9)
    lines = [record.getMessage() for record in caplog.records if record.name == "gradbal"]
    assert len(lines) == (engine == "batched")
    assert max(optimizer.check(losses(run)).values()) <= 1e-10


def test_compiled_trunk_under_a_representation() -> None:
    """One pass through the trunk, as compiled graphs with donated buffers want it."""
    model, run = compiled(trunk_only=True)
    plain = Toy()
    optimizer = wrapped(model, "ew", lr=0.0)
    optimizer.step(losses(run))
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(), lr=0.0)
    optimizer.step(losses(run))
    wrapped(plain, "upgrad", engine="representation").backward(losses(plain))
    assert_same(grads(model), grads(plain), 1e-9)


def test_the_tasks_own_parameters_are_seen_in_a_compiled_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, run = compiled(trunk_only=False)
    optimizer = wrapped(model, "upgrad", lr=0.0)
    with caplog.at_level(logging.INFO, logger="gradbal"):
        for _ in range(2):
            optimizer.step(losses(run))
    explained = optimizer.explain(losses(run))
    own = wrapped(model, "upgrad", lr=0.0).explain(model.losses())
    line = next(line for line in own.splitlines() if "tasks share" in line)
    assert line.split(";")[0] in explained
    lines = [record.getMessage() for record in caplog.records if record.name == "gradbal"]
    assert len(lines) == 1
    assert "compiled" in lines[0]
    assert "counts as one task's own" in lines[0]


def test_compiled_trunk_right_under_the_heads_is_no_surprise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, _ = compiled(trunk_only=True)
    optimizer = wrapped(model, "upgrad", lr=0.0)
    z = model.trunk(data(6, 4))
    with caplog.at_level(logging.INFO, logger="gradbal"):
        optimizer.step([square(head(z) - k) for k, head in enumerate(model.heads)])
    assert not [record for record in caplog.records if record.name == "gradbal"]


def test_compiled_model_with_equal_weights() -> None:
    model, run = compiled(trunk_only=False)
    plain = Toy()
    wrapped(model, "ew").step(losses(run))
    sum(losses(plain)).backward()
    assert_same(grads(model), grads(plain), 1e-10)


def test_donated_buffers_are_told_with_a_remedy_that_is_right() -> None:
    """Torch's advice for this error gives wrong gradients in silence; ours does not."""
    model, run = compiled(trunk_only=True)
    optimizer = wrapped(model, "ew", lr=0.0)
    optimizer.step(losses(run))  # an ordinary pass comes first, so the buffers are donated
    other = wrapped(model, "upgrad", lr=0.0)
    for call in (other.step, other.check):
        with pytest.raises(RuntimeError, match=re.escape("Representation")) as caught:
            call(losses(run))
        assert "donated_buffer" not in str(caught.value)


def compiled_heads(model: Toy) -> Callable[[Tensor], list[Tensor]]:
    heads = [torch.compile(head, backend="aot_eager") for head in model.heads]

    def run(x: Tensor) -> list[Tensor]:
        z = model.trunk(x).tanh()
        return [square(head(z) - k) for k, head in enumerate(heads)]

    return run


def compiled_loss(model: Toy) -> Callable[[Tensor], list[Tensor]]:
    loss = torch.compile(lambda y, k: (y - k).square().mean(), backend="aot_eager", dynamic=True)
    return lambda x: [loss(y, torch.tensor(float(k))) for k, y in enumerate(model(x))]


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("build", [compiled_heads, compiled_loss])
def test_compiled_heads_or_losses_train_as_plain_ones(
    build: Callable[[Toy], Callable[[Tensor], list[Tensor]]], engine: str
) -> None:
    """The trunk stays in the graph, so what is shared is found as ever."""
    model, plain = Toy(), Toy()
    run = build(model)
    optimizer = wrapped(model, "upgrad", engine=engine)
    reference = wrapped(plain, "upgrad", engine=engine)
    for batch in range(3):
        x = data(6, 4, seed=batch)
        optimizer.step(run(x))
        reference.step([square(y - k) for k, y in enumerate(plain(x))])
        assert_same(model.parameters(), plain.parameters(), 1e-9)
    assert max(optimizer.check(run(data(6, 4))).values()) <= 1e-10
    assert "3 tasks share 55 parameters in 4 tensors" in optimizer.explain(run(data(6, 4)))
