"""The plan as users meet it: forms of losses, what is said, how many passes are made."""

import logging
from collections.abc import Callable

import pytest
import torch
from models import Counted, Toy, assert_same, data, fill, grads, lone_rows, wrapped
from torch import Tensor, nn

from gradbal import engines

# ---------------------------------------------------------------------- forms of losses


def test_list_stack_mapping_and_their_pieces_are_the_same() -> None:
    wanted = None
    forms: dict[str, Callable[[list[Tensor]], object]] = {
        "list": lambda found: found,
        "tuple": tuple,
        "stack": torch.stack,
        "hstack of one": lambda found: torch.stack([*found]),
        "unbound": lambda found: torch.stack(found).unbind(),
        "selected": lambda found: [torch.stack(found)[i] for i in range(3)],
        "from the end": lambda found: [torch.stack(found)[i - 3] for i in range(3)],
        "iterated": lambda found: list(torch.stack(found)),
        "mapping": lambda found: dict(zip("abc", found, strict=True)),
        "some selected": lambda found: {
            "a": torch.stack(found[:2])[0],
            "b": found[1],
            "c": torch.stack(found)[2],
        },
        "of shape 1": lambda found: [loss.reshape(1) for loss in found],
    }
    for form, make in forms.items():
        model = Toy()
        optimizer = wrapped(model, "upgrad")
        optimizer.backward(make(model.losses()))  # type: ignore[arg-type]  # all are losses
        found = grads(model)
        wanted = wanted or found
        assert_same(found, wanted, 1e-14), form
        heads = 2 * len(model.heads)
        assert "share 55 parameters in 4 tensors" in optimizer.explain(make(model.losses())), form
        assert heads == 6


def test_stack_keeps_heads_out_of_the_jacobian() -> None:
    model = Toy()
    optimizer = wrapped(model, "nash_mtl", heads="plain")
    optimizer.backward(torch.stack(model.losses()))
    rows = lone_rows(model.losses(), list(model.parameters()))
    for task, head in enumerate(model.heads):
        positions = [i for i, p in enumerate(model.parameters()) if p is head.weight]
        assert_same([head.weight.grad], [rows[task][positions[0]]])


def test_stack_of_two_dtypes() -> None:
    model = Toy(2)

    def losses() -> list[Tensor]:
        a, b = model.losses()
        return [a, b.float()]

    wrapped(model, "mgda").backward(losses())
    wanted = grads(model)
    model.zero_grad()
    wrapped(model, "mgda").backward(torch.stack(losses()))
    assert_same(grads(model), wanted, 1e-6)


def test_missing_graph_inside_a_stack_is_an_absent_task() -> None:
    model = Toy(2)
    losses = torch.stack([*model.losses(), torch.ones(()).double()])
    optimizer = wrapped(model, "mgda")
    optimizer.backward(losses)
    assert optimizer.last is not None
    assert optimizer.last.tasks == ("0", "1")


def test_a_layer_whose_outputs_several_tasks_read_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = fill(nn.Linear(4, 3))
    optimizer = wrapped(model)
    with caplog.at_level(logging.INFO, logger="gradbal"):
        for _ in range(2):
            optimizer.step((model(data(5, 4)) - 1).square().mean(dim=0))
    assert [record.getMessage() for record in caplog.records] == [
        "The tasks read parts of what one operation makes (AddmmBackward0), so its parameters and "
        "all under it count as shared; if that is not meant, give each task a layer of its own, or "
        "name the shared parameters with `shared=`."
    ]


@pytest.mark.parametrize("rule", ["ew", "uw", "upgrad", "graddrop"])
def test_parameters_outside_the_optimizer_are_left_alone_and_said_once(
    rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = Toy()
    optimizer = wrapped(model.trunk, rule)
    with caplog.at_level(logging.INFO, logger="gradbal"):
        for _ in range(2):
            optimizer.step(model.losses())
    assert [p.grad for p in model.heads.parameters()] == [None] * 6
    assert [record.getMessage() for record in caplog.records] == [
        "6 parameters under the losses belong to no group of the base optimizer; their gradients "
        "are left alone."
    ]


# ---------------------------------------------------------------------- passes


class Watched(Toy):
    """A toy that counts the passes through each part."""

    def __init__(self, n_tasks: int = 3) -> None:
        super().__init__(n_tasks)
        self.passes = Counted()

    def forward(self, x: Tensor) -> list[Tensor]:
        inner = self.passes.watch("trunk", self.trunk[0](x))
        z = self.trunk[2](inner.tanh()).tanh()
        outs = [self.passes.watch(f"head {k}", head(z)) for k, head in enumerate(self.heads)]
        return [y * 1 for y in outs]


PASSES = {
    "sequential": ("upgrad", "sequential", {}, [3, 1, 1, 1]),
    "auto": ("upgrad", "auto", {}, [3, 1, 1, 1]),
    "batched": ("upgrad", "batched", {}, [1, 1, 1, 1]),
    "chunks of two": ("upgrad", engines.Batched(chunk_size=2), {}, [2, 1, 1, 1]),
    "representation": ("upgrad", "representation", {}, [1, 1, 1, 1]),
    "elementwise": ("graddrop", "sequential", {}, [3, 1, 1, 1]),
    "rule on losses": ("uw", "auto", {}, [1, 1, 1, 1]),
    "rule on losses, plain heads": ("uw", "auto", {"heads": "plain"}, [1, 1, 1, 1]),
    "groups": ("upgrad", "sequential", {"groups": "tensor"}, [3, 1, 1, 1]),
}


@pytest.mark.parametrize(("rule", "engine", "options", "wanted"), PASSES.values(), ids=PASSES)
def test_passes(rule: str, engine: object, options: dict[str, str], wanted: list[int]) -> None:
    model = Watched()
    wrapped(model, rule, engine=engine, **options).step(model.losses())
    names = ("trunk", "head 0", "head 1", "head 2")
    assert [model.passes.counts[name] for name in names] == wanted


def test_passes_with_an_absent_task() -> None:
    model = Watched()
    wrapped(model, "mgda").step(dict(zip("ac", model.losses()[::2], strict=True)))
    names = ("trunk", "head 0", "head 1", "head 2")
    assert [model.passes.counts[name] for name in names] == [2, 1, 0, 1]


def test_auxiliary_losses_take_one_more_pass() -> None:
    model = Watched()
    losses = model.losses()
    wrapped(model, "mgda").step(losses[:2], aux=losses[2])
    names = ("trunk", "head 0", "head 1", "head 2")
    assert [model.passes.counts[name] for name in names] == [3, 1, 1, 1]


def test_frozen_trunk_is_not_entered() -> None:
    model = Watched()
    model.trunk[0].requires_grad_(False)
    inner = data(6, 5, seed=1).requires_grad_()
    model.trunk[0].register_forward_hook(lambda module, args, out: inner * 1)
    optimizer = wrapped(model, "mgda")
    optimizer.step(model.losses())
    assert inner.grad is None
    assert [p.grad is None for p in model.trunk.parameters()] == [True, True, False, False]
