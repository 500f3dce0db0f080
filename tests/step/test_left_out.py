"""``on_nonfinite="absent"``: tasks that are not finite are left out, as if they had no loss."""

from itertools import product
from typing import Any

import pytest
import torch
from models import Toy, assert_same, wrapped
from torch import Tensor

NAN = float("nan")
RULES = ["upgrad", "ew", "uw", "graddrop", "moco", "mgda", "nash_mtl", "db_mtl"]
ENGINES = ["sequential", "batched", "factored", "streaming", "representation"]
SPOILED = ["loss", "gradient"]


def possible(rule: str, engine: str, spoiled: str) -> bool:
    if rule in ("graddrop", "moco", "db_mtl") and engine in ("streaming", "representation"):
        return False  # refused
    if engine == "representation" and spoiled == "gradient":
        return False  # the second forward pass meets the first in parameters only
    # nor one pass over all losses, of which nothing shows whose gradient is at fault
    return not (rule in ("ew", "uw") and spoiled == "gradient")


CASES = [case for case in product(RULES, ENGINES, SPOILED) if possible(*case)]


def losses(model: Toy, batch: int, spoiled: str) -> dict[str, Tensor]:
    """Return losses of which the second, or its gradient, is not finite if asked for."""
    found = model.named(batch)
    if spoiled == "loss":
        found["b"] = found["b"] * NAN
    elif spoiled == "gradient":
        z = model.trunk(torch.ones(1, 4).double())
        found["b"] = found["b"] + (z * 0).sum().sqrt()
    elif spoiled == "left out":
        del found["b"]
    return found


def trained(rule: str, engine: str, spoiled: str) -> tuple[Toy, Any]:
    model = Toy()
    optimizer = wrapped(model, rule, engine=engine, on_nonfinite="absent")
    for batch, how in enumerate(["", spoiled, "", spoiled]):
        optimizer.step(losses(model, batch, how))
    return model, optimizer


@pytest.mark.parametrize(("rule", "engine", "spoiled"), CASES)
def test_a_task_that_is_not_finite_is_absent(rule: str, engine: str, spoiled: str) -> None:
    model, optimizer = trained(rule, engine, spoiled)
    alone, reference = trained(rule, engine, "left out")
    assert_same(model.parameters(), alone.parameters(), 1e-12)
    assert optimizer.last.tasks == reference.last.tasks == ("a", "c")
    for name, kept in reference.core.state.get("model", {}).items():
        assert_same([optimizer.core.state["model"][name]], [kept], 1e-12)


@pytest.mark.parametrize("rule", ["ew", "upgrad"])
def test_a_step_without_any_finite_loss_is_skipped(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, on_nonfinite="absent")
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step([loss * NAN for loss in model.losses()])
    assert_same(model.parameters(), before, 0)
    assert optimizer.core.skipped == 1


def test_an_auxiliary_loss_is_no_task_and_cannot_be_left_out() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", on_nonfinite="absent")
    with pytest.raises(ValueError, match="the auxiliary loss is not finite"):
        optimizer.step(model.losses(), aux=model.losses(1)[0] * NAN)


def test_a_capturable_step_reads_nothing_and_so_refuses() -> None:
    with pytest.raises(ValueError, match="with `capturable` nothing is read back"):
        wrapped(Toy(), "upgrad", on_nonfinite="absent", capturable=True)
