"""Conflict layer by layer: that of lone passes, and nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Toy, assert_same, everything, lone_rows, says, square, wrapped
from torch import Tensor, nn

from gradbal import Recorder
from gradbal.diagnostics import layer_conflicts


@pytest.mark.parametrize(
    "give", [list, torch.stack, lambda some: dict(zip("abc", some, strict=True))]
)
def test_layers_are_those_of_lone_passes(give: Callable[[list[Tensor]], Any]) -> None:
    model = Toy()
    given = give(model.losses())
    before, draws = everything(model, wrapped(model)), torch.get_rng_state()
    found = layer_conflicts(given, model)
    assert everything(model, wrapped(model)) == before
    assert torch.equal(torch.get_rng_state(), draws)
    assert found.tasks == (tuple("abc") if isinstance(given, dict) else ("0", "1", "2"))
    names = [f"trunk.{n}" for n, _ in model.trunk.named_parameters()]
    assert [*found.grams] == names
    rows = lone_rows(model.losses(), [*model.trunk.parameters()])
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        matrix = torch.stack([grad.flatten() for grad in column if grad is not None])
        wanted = torch.cosine_similarity(matrix[:, None], matrix[None], dim=-1)
        assert_same([found.grams[name]], [matrix @ matrix.T])
        assert_same([found.cosines[name]], [wanted])
    losses = list(given.values() if isinstance(given, dict) else given)
    torch.autograd.backward(losses)  # the graph is still there
    optimizer = wrapped(model)
    optimizer.backward(model.losses())


def test_layers_may_be_modules_and_sum_up_to_what_a_rule_sees() -> None:
    model = Toy()
    optimizer = wrapped(model, "mgda")
    recorder = Recorder(optimizer)
    losses = model.losses()
    layers = {"first": model.trunk[0], "last": [model.trunk[2].weight, model.trunk[2].bias]}
    found = layer_conflicts(losses, layers)
    optimizer.step(losses)
    assert [*found.grams] == ["first", "last"]
    assert_same([found.grams["first"] + found.grams["last"]], [recorder.course().grams[0]])


def test_layers_of_some_tasks_only() -> None:
    shared, scale = nn.Embedding(5, 2, sparse=True).double(), nn.Parameter(torch.ones(()).double())
    frozen = nn.Parameter(torch.ones(2).double(), requires_grad=False)
    values = shared(torch.tensor([0, 3]))
    losses = {
        "a": square(values * frozen),
        "b": square(values - 1),
        "c": square(scale * values.detach()),
        "d": square(scale * values[:1]),
        "gone": torch.ones(()),
    }
    found = layer_conflicts(losses, {"table": shared, "scale": scale, "frozen": frozen})
    assert found.tasks == ("a", "b", "c", "d")
    assert [*found.grams] == ["table", "scale"]
    reach = {"table": [True, True, False, True], "scale": [False, False, True, True]}
    for name, cosines in found.cosines.items():
        assert cosines.diagonal().isfinite().tolist() == reach[name]
    assert found.cosines["scale"][2, 3] == pytest.approx(1)


def test_nothing_shared_is_told() -> None:
    model = Toy()
    says(
        ValueError,
        "layer_conflicts: no layer is reached by several losses, so there is nothing to compare; "
        "name parameters that several tasks use.",
        lambda: layer_conflicts(model.losses(), model.heads),
    )
