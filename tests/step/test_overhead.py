"""What a step does beside the model's own work: counted, and named for a profiler."""

from collections import Counter

import pytest
import torch
from models import Dispatched, Toy, wrapped
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile


def counted(rule: str, n_tasks: int) -> Dispatched:
    """Return what a step after the first ones dispatches."""
    model = Toy(n_tasks)
    optimizer = wrapped(model, rule, engine="sequential")
    for _ in range(2):
        optimizer.step(model.losses())
    losses = model.losses()
    blocks = optimizer._flow.descent.keep.blocks
    with Dispatched(*(block.rows for block in blocks)) as dispatched:
        optimizer.step(losses)
    return dispatched


@pytest.mark.parametrize("n_tasks", [2, 3, 8])
def test_rows_are_written_once_and_read_twice(n_tasks: int) -> None:
    dispatched = counted("mgda", n_tasks)
    assert dispatched.touching == {"_foreach_copy_": n_tasks, "mm": 1, "mv": 1}


def test_the_direction_is_one_new_tensor_of_which_the_gradients_are_views() -> None:
    model = Toy()
    optimizer = wrapped(model, "mgda", engine="sequential")
    storages = []
    for batch in range(2):
        optimizer.step(model.losses(batch))
        kept = [p.grad for p in model.trunk.parameters() if p.grad is not None]
        storages.append((kept, {grad.untyped_storage().data_ptr() for grad in kept}))
    (_, first), (_, second) = storages
    assert len(first) == len(second) == 1
    assert first != second


def plain(n_tasks: int) -> Counter[str]:
    """Return what a step on the summed loss dispatches."""
    model = Toy(n_tasks)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = model.losses()
    with Dispatched() as dispatched:
        sum(losses).backward()  # type: ignore[union-attr]  # not empty
        base.step()
    return dispatched.all


@pytest.mark.parametrize("rule", ["ew", "uw", "famo"])
def test_rules_on_losses_dispatch_as_much_for_many_tasks_as_for_few(rule: str) -> None:
    few, many = (counted(rule, n_tasks).all.total() - plain(n_tasks).total() for n_tasks in (2, 8))
    assert few == many
    assert rule != "ew" or few <= 5  # torch 2.7 makes the initial gradient in two operations


NAMES = {
    "upgrad": ["bookkeeping", "gram", "jacobian", "plan", "solve", "write_grad"],
    "ew": ["backward", "bookkeeping", "solve"],
}


@pytest.mark.parametrize("rule", NAMES)
def test_parts_of_a_step_are_named_for_a_profiler(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    for _ in range(2):  # then the graph is known to have as many nodes as the last one
        optimizer.step(model.losses())
    losses = model.losses()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step(losses)
    names = {event.name for event in profiler.events() or ()}
    assert sorted(n for n in names if n.startswith("gradbal::")) == [
        f"gradbal::{name}" for name in NAMES[rule]
    ]
    assert "Optimizer.step#MTLOptimizer.step" in names


def test_nothing_is_named_while_nobody_profiles() -> None:
    dispatched = counted("upgrad", 3)
    assert dispatched.all["_record_function_enter_new"] == 1  # torch's, around the base's step


def test_a_step_hook_is_called_on_the_optimizer_and_its_base() -> None:
    model, called = Toy(), Counter[str]()
    optimizer = wrapped(model, "ew")
    optimizer.register_step_pre_hook(lambda *args: called.update(["before"]))
    optimizer.register_step_post_hook(lambda *args: called.update(["after"]))
    handle = register_optimizer_step_post_hook(lambda *args: called.update(["anywhere"]))
    optimizer.step(model.losses())
    handle.remove()
    optimizer.step(model.losses())
    assert called == {"before": 2, "after": 2, "anywhere": 2}
