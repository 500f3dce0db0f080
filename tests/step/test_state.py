"""A rule's tensors: axes over tasks, parts and growth."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from gradbal.rules import _state
from gradbal.rules._base import Context, LossRule, State
from gradbal.rules._state import grown, merged, new_state, part, task_axes, task_index
from gradbal.step.state import Core

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Mixed(LossRule):
    """Keeps a tensor of every kind."""

    per_task: ClassVar[tuple[str, ...]] = ("bounds",)
    learned: ClassVar[tuple[str, ...]] = ("logits",)

    bounds: tuple[float, ...] | None = None

    def init(self, losses: Tensor) -> State:
        m = len(losses)
        return {
            "logits": torch.zeros_like(losses),
            "pairs": losses.new_zeros(m, m),
            "table": losses.new_zeros(m, 3),  # 3 columns, also where there are 3 tasks
            "count": losses.new_zeros(()),
        }

    def weights(self, signal: Tensor, ctx: Context) -> Tensor:
        return torch.ones_like(signal)


def test_axes_over_tasks_are_found_by_size() -> None:
    axes = task_axes(Mixed(), "adam")
    expected = {"logits": (0,), "pairs": (0, 1), "table": (0,), "count": (), "bounds": (0,)}
    slots = {f"logits.{slot}": (0,) for slot in ("steps", "mean", "square")}
    assert axes == expected | slots


@pytest.mark.parametrize("name", ["logits", "pairs", "table", "count"])
def test_a_part_that_is_put_back_changes_only_its_tasks(name: str) -> None:
    axes = task_axes(Mixed(), "sgd")[name]
    state = new_state(Mixed(), "sgd", 4, CPU)
    whole = torch.arange(float(state[name].numel()), dtype=torch.float64).view_as(state[name])
    some = part(whole, axes, [3, 1])
    same = merged(whole, some, axes, [3, 1])
    torch.testing.assert_close(same, whole, rtol=0, atol=0)
    moved = merged(whole, some + 100, axes, [3, 1])
    changed = moved != whole
    if axes:
        assert not changed[[0, 2]].any()
        assert changed[3].any()
        assert (changed.sum() == some.numel()).item()
    else:
        assert changed.all()


def test_growth_keeps_what_is_there() -> None:
    state = {name: tensor + 1 for name, tensor in new_state(Mixed(), "adam", 2, CPU).items()}
    larger = grown(state, new_state(Mixed(), "adam", 3, CPU))
    assert larger["logits"].tolist() == [1, 1, 0]
    assert larger["pairs"].tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert larger["count"].item() == 1


def test_only_so_many_sets_of_tasks_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_state, "_INDICES", {})
    monkeypatch.setattr(_state, "KEPT", 2)
    found = [task_index([0, last], CPU) for last in range(1, 5)]
    assert [index.tolist() for index in found] == [[0, 1], [0, 2], [0, 3], [0, 4]]
    again = [task_index([0, last], CPU) for last in range(1, 5)]
    assert [a is b for a, b in zip(found, again, strict=True)] == [True, True, False, False]
    assert len(_state._INDICES) == 2


def test_a_transaction_that_fails_leaves_nothing_behind() -> None:
    core = Core(Mixed(), tasks=None, learner="adam", seed=3)
    before = core.contents()

    def change() -> None:
        core.number_tasks(["a", "b"], 2)
        losses = torch.ones(2, dtype=torch.float64)
        ctx = core.context("model", [0, 1], losses)
        ctx.state["pairs"] += 1
        ctx.slopes["logits"] = losses
        torch.rand(1, generator=ctx.generator)
        core.commit("model", [0, 1], ctx)
        core.learn(0.1)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), core.transaction():
        change()
    after = core.contents()
    assert torch.equal(before["generator"].pop("state"), after["generator"].pop("state"))
    assert torch.equal(before["step"].pop("epoch"), after["step"].pop("epoch"))
    assert before == after
