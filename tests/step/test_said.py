"""What a person believes is balancing and is not is said, in one line, once."""

import logging
from collections.abc import Callable

import pytest
import torch
from models import Toy, data, wrapped
from torch import Tensor

from gradbal import make_rule


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger="gradbal")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "gradbal"]


Said = Callable[[], list[str]]


def test_a_step_without_losses_after_a_plain_backward(said: Said) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    for _ in range(2):
        torch.stack(model.losses()).sum().backward()
        optimizer.step()
    (line,) = said()
    assert line.startswith("step() was called without losses after an ordinary backward pass")


def test_backward_and_step_are_no_surprise(said: Said) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    for batch in range(2):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch))
        optimizer.step()
    assert not said()


def test_a_closure_that_returns_the_sum(said: Said) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    optimizer.step(lambda: torch.stack(model.losses()).sum())
    (line,) = said()
    assert line.startswith("The closure returned one number and wrote no gradient")


def test_a_task_whose_gradient_is_zero(said: Said) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    for _ in range(2):
        losses = model.named()
        losses["b"] = losses["b"] * 0
        optimizer.step(losses)
    (line,) = said()
    assert "gradient of task 'b' on the shared parameters is exactly zero in step 0" in line


@pytest.mark.parametrize("why", ["frozen", "detached"])
def test_nothing_shared(said: Said, why: str) -> None:
    model = Toy()
    model.trunk.requires_grad_(why != "frozen")
    optimizer = wrapped(model, "upgrad")
    for _ in range(2):
        z = model.trunk(data(6, 4)).tanh()
        z = z.detach() if why == "detached" else z
        optimizer.step([head(z).square().mean() for head in model.heads])
    (line,) = said()
    assert line.startswith("The tasks share no parameter that is trained")


@pytest.mark.parametrize("rule", ["dwa", "igb", "stch"])
def test_an_epoch_that_never_ends(said: Said, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradbal.step.balance.STRETCH", 5)
    model = Toy()
    optimizer = wrapped(model, rule, lr=0.0)
    for _ in range(11):
        optimizer.step(model.losses())
    (line,) = said()
    assert "changes its weights at the end of an epoch only" in line
    counting = wrapped(model, make_rule(rule, window=3), lr=0.0)
    for _ in range(6):
        counting.step(model.losses())
    assert len(said()) == 1


def test_a_task_that_is_never_seen(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradbal.step.balance.STRETCH", 5)
    model = Toy()
    optimizer = wrapped(model, "ew", lr=0.0)
    optimizer.step(model.named())
    for _ in range(12):
        losses: dict[str, Tensor | None] = {**model.named(), "b": None}
        optimizer.step(losses)
    (line,) = said()
    assert line == "Task 'b' had no loss with a graph in 5 steps."


@pytest.mark.parametrize("other", ["c", "depth"])
def test_a_name_that_was_not_announced(other: str) -> None:
    model = Toy(2)
    optimizer = wrapped(model, "upgrad", tasks=["a", "b"])
    a, b = model.losses()
    with pytest.raises(ValueError, match=f"got one of '{other}'; correct the name"):
        optimizer.step({"a": a, other: b})
    assert optimizer.core.names == ["a", "b"]


def test_a_checkpoint_of_other_tasks() -> None:
    model = Toy(2)
    optimizer = wrapped(model, "upgrad", tasks=["a", "b"])
    optimizer.step(dict(zip("ab", model.losses(), strict=True)))
    other = wrapped(Toy(2), "upgrad", tasks=["x", "y"])
    with pytest.raises(ValueError, match="expected the tasks in `tasks=`, x, y, got a, b"):
        other.load_state_dict(optimizer.state_dict())
    assert other.core.names == ["x", "y"]


@pytest.mark.parametrize("missing", [None, 0, 0.0, torch.tensor(0.0)])
def test_stand_ins_for_a_task_without_labels(missing: object) -> None:
    model, alone = Toy(3), Toy(3)
    first, second = wrapped(model, "upgrad"), wrapped(alone, "upgrad")
    found = dict(enumerate(model.losses()))
    first.step({**found, 1: missing})
    second.step({key: loss for key, loss in enumerate(alone.losses()) if key != 1})
    assert first.last.tasks == ("0", "2")
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("form", [iter, tuple, lambda losses: (x for x in losses)])
def test_any_iterable_of_losses(form: Callable[[list[Tensor]], object]) -> None:
    model, alone = Toy(3), Toy(3)
    wrapped(model, "upgrad").step(form(model.losses()))
    wrapped(alone, "upgrad").step(alone.losses())
    named = Toy(3)
    wrapped(named, "upgrad").step(named.named().values())
    for a, b, c in zip(*(m.parameters() for m in (model, alone, named)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
