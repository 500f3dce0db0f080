"""``MTLOptimizer`` as a citizen: what schedulers, scalers, trainers and checkpoints do with it."""

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import Toy, assert_same, frozen_copy, grads, wrapped
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel

from gradbal import MTLOptimizer, engines
from gradbal.optimizer import MTLOptimizer as Same


def adam(model: nn.Module, rule: Any = "upgrad", **options: Any) -> MTLOptimizer:
    return MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), rule, **options)


def test_it_is_a_torch_optimizer() -> None:
    optimizer = adam(Toy())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert Same is MTLOptimizer
    classes = [c for c in MTLOptimizer.__mro__ if "_step_supports_amp_scaling" in vars(c)]
    assert classes[0]._step_supports_amp_scaling is False  # of a class, not of the instance


def test_amp_flag_is_not_that_of_a_fused_base() -> None:
    model = Toy()
    base = torch.optim.AdamW(model.parameters(), fused=True)
    assert base._step_supports_amp_scaling
    assert MTLOptimizer(base)._step_supports_amp_scaling is False


def test_groups_state_and_defaults_are_the_bases_own() -> None:
    model = Toy()
    optimizer = adam(model)
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.state is optimizer.base.state
    assert optimizer.defaults is optimizer.base.defaults
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.base.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_setters_reach_the_base(name: str) -> None:
    optimizer = adam(Toy())
    value = copy.copy(getattr(optimizer, name))
    setattr(optimizer, name, value)
    assert getattr(optimizer.base, name) is value
    assert getattr(optimizer, name) is value


def test_private_names_never_come_from_the_base() -> None:
    optimizer = adam(Toy())
    optimizer.base._secret = 1  # type: ignore[attr-defined]  # made here
    optimizer.base.public = 2  # type: ignore[attr-defined]  # made here
    assert optimizer.public == 2
    for name in ("_secret", "optimizer", "nothing_like_this"):
        with pytest.raises(AttributeError):
            getattr(optimizer, name)
    empty = MTLOptimizer.__new__(MTLOptimizer)
    for name in ("base", "core", "anything"):
        with pytest.raises(AttributeError):
            getattr(empty, name)


def test_hooks_are_called() -> None:
    model = Toy()
    optimizer = adam(model)
    called: list[str] = []
    hooks = [
        optimizer.register_step_pre_hook(lambda o, args, kwargs: called.append("pre")),
        optimizer.register_step_post_hook(lambda o, args, kwargs: called.append("post")),
        optimizer.register_state_dict_pre_hook(lambda o: called.append("save")),
        optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1}),
        optimizer.register_load_state_dict_pre_hook(
            lambda o, d: {k: v for k, v in d.items() if k != "mine"}
        ),
        optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded")),
    ]
    optimizer.step(model.losses())
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert called == ["pre", "post", "save", "loaded"]
    for hook in hooks:
        hook.remove()
    optimizer.step(model.losses())
    assert "mine" not in optimizer.state_dict()
    assert called == ["pre", "post", "save", "loaded"]


def test_step_pre_hook_may_change_the_arguments() -> None:
    model, plain = Toy(), Toy()
    optimizer = wrapped(model, "upgrad")
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, model.losses(3)), kwargs))
    optimizer.step(model.losses(0))
    wrapped(plain, "upgrad").step(plain.losses(3))
    assert_same(model.parameters(), plain.parameters(), 0)


def test_profiler_shows_both_steps_and_our_phases() -> None:
    model = Toy()
    optimizer = adam(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step(model.losses())
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {
        "Optimizer.step#MTLOptimizer.step",
        "Optimizer.step#AdamW.step",
        "gradbal::jacobian",
        "gradbal::gram",
        "gradbal::solve",
        "gradbal::write_grad",
    } <= names


@pytest.mark.parametrize("rule", ["upgrad", "uw", "gradvac", "famo"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_as_the_original_would(rule: str, way: str) -> None:
    model = Toy()
    optimizer = adam(model, rule)
    schedulers.StepLR(optimizer, 2)
    optimizer.register_step_post_hook(lambda o, args, kwargs: None)
    for batch in range(2):
        optimizer.step(model.losses(batch))
    if way == "pickle":
        other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other_model, other = copy.deepcopy((model, optimizer))
    assert other.param_groups[0]["params"][0] is next(iter(other_model.parameters()))
    for batch in range(2, 4):
        optimizer.step(model.losses(batch))
        other.step(other_model.losses(batch))
    assert_same(other_model.parameters(), model.parameters(), 0)
    assert frozen_copy(other.state_dict()) == frozen_copy(optimizer.state_dict())


def test_a_copy_does_not_disturb_other_instances() -> None:
    model = Toy()
    optimizer = adam(model)
    copy.deepcopy(optimizer)
    third = adam(Toy())
    third.register_step_post_hook(lambda o, args, kwargs: None)
    optimizer.step(model.losses())


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_with_a_named_representation(way: str) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(model.trunk))
    optimizer.step(model.losses())
    pair = (model, optimizer)
    other_model, other = (
        copy.deepcopy(pair) if way == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    optimizer.step(model.losses(1))
    other.step(other_model.losses(1))
    assert_same(other_model.parameters(), model.parameters(), 0)


def test_model_with_a_named_representation_can_be_averaged() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(model.trunk))
    averaged = AveragedModel(model)
    for batch in range(3):
        optimizer.step(model.losses(batch))
        averaged.update_parameters(model)
    averaged.module.losses()


class Canary:
    """Dies with what holds it."""


def test_nothing_keeps_the_graph_or_the_optimizer_alive() -> None:
    model = Toy()
    for engine in ("sequential", "batched", engines.Representation(model.trunk)):
        optimizer = wrapped(model, "upgrad", engine=engine)
        losses = model.losses()
        optimizer.step(losses)
        canary = Canary()
        losses[0].grad_fn.metadata["canary"] = canary  # type: ignore[union-attr]  # has one
        in_graph = weakref.ref(canary)
        del losses, canary
        gc.collect()
        assert in_graph() is None
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None


def test_repr() -> None:
    start = "MTLOptimizer(EW(reduction='sum'), engine=Auto(), base=SGD (\nParameter Group 0"
    assert repr(wrapped(Toy(), "ew")).startswith(start)


def test_a_group_added_later() -> None:
    model, extra = Toy(), nn.Parameter(torch.ones(2).double())
    optimizer = adam(model)
    optimizer.step(model.losses())
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert len(optimizer.param_groups) == len(optimizer.base.param_groups) == 2
    optimizer.step([loss + extra.sum() for loss in model.losses()])
    assert extra.grad is not None
    assert not torch.equal(extra.detach(), torch.ones(2).double())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.StepLR(o, 1, 0.5),
        lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=5),
        lambda o: schedulers.CyclicLR(o, 0.01, 0.1, cycle_momentum=True),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
        lambda o: SWALR(o, 0.05),
        lambda o: schedulers.ChainedScheduler([schedulers.ExponentialLR(o, 0.9)]),
    ],
)
@pytest.mark.parametrize("rule", ["upgrad", "uw", "gradnorm"])
def test_schedulers_change_the_base(make: Any, rule: str) -> None:
    model = Toy()
    optimizer = adam(model, rule)
    schedule = make(optimizer)
    rates = []
    for batch in range(4):
        optimizer.step(model.losses(batch))
        schedule.step(*([1.0] if isinstance(schedule, schedulers.ReduceLROnPlateau) else []))
        rates.append(optimizer.base.param_groups[0]["lr"])
    assert len(set(rates)) > 1


def test_two_phases_count_as_a_step_for_schedulers() -> None:
    model = Toy()
    optimizer = adam(model)
    schedule = schedulers.StepLR(optimizer, 1)  # warns if no step came before its own
    optimizer.backward(model.losses())
    optimizer.step()
    schedule.step()


@pytest.mark.parametrize("rule", ["upgrad", "uw", "famo", "gradvac"])
def test_plain_step_does_not_touch_the_rule(rule: str) -> None:
    """Distributed checkpointing calls ``step(closure=None)`` with zero gradients to make state."""
    model = Toy()
    optimizer = adam(model, rule)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = frozen_copy(optimizer.core.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure=None)
    optimizer.step(None)
    optimizer.zero_grad(set_to_none=True)
    assert frozen_copy(optimizer.core.state_dict()) == before
    assert len(optimizer.state) == 10


def test_what_distributed_checkpointing_does() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, other = Toy(), Toy(seed=1)
    optimizer, second = adam(model), adam(other)
    for batch in range(2):
        optimizer.step(model.losses(batch))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, second, saved)
    second.core.load_state_dict(optimizer.core.state_dict())
    optimizer.step(model.losses(2))
    second.step(other.losses(2))
    assert_same(other.parameters(), model.parameters(), 0)


class Shell(MTLOptimizer):
    """What Lightning and Fabric make: the class and the attributes, but another object."""

    def __init__(self, optimizer: MTLOptimizer) -> None:
        self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self.original = optimizer


@pytest.mark.parametrize("rule", ["upgrad", "uw", "famo", "gradvac"])
def test_a_shell_around_it_changes_the_one_optimizer_there_is(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = adam(model, rule), adam(plain, rule)
    shell = Shell(optimizer)
    for batch in range(4):
        if batch % 2:
            shell.step(model.losses(batch))
        else:
            optimizer.zero_grad()
            shell.backward(model.losses(batch))
            optimizer.step()
        reference.step(plain.losses(batch))
    assert_same(model.parameters(), plain.parameters(), 0)
    assert frozen_copy(optimizer.state_dict()) == frozen_copy(reference.state_dict())
    assert frozen_copy(optimizer.metrics()) == frozen_copy(reference.metrics())
    assert frozen_copy(shell.metrics()) == frozen_copy(reference.metrics())
    assert shell.core is optimizer.core


def test_what_accelerate_does_to_the_state() -> None:
    """It rebuilds every container by its type with its items."""
    model = Toy()
    optimizer = adam(model, "gradvac")
    optimizer.step(model.losses())

    def rebuilt(tree: Any) -> Any:
        if isinstance(tree, dict):
            return type(tree)({key: rebuilt(value) for key, value in tree.items()})
        if isinstance(tree, list | tuple):
            return type(tree)(rebuilt(value) for value in tree)
        return tree.clone() if isinstance(tree, torch.Tensor) else tree

    before = frozen_copy(optimizer.state_dict())
    optimizer.load_state_dict(rebuilt(optimizer.state_dict()))
    assert frozen_copy(optimizer.state_dict()) == before


def test_global_hooks_see_the_steps() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    model = Toy()
    optimizer = adam(model)
    seen: list[str] = []
    handle = register_optimizer_step_post_hook(lambda o, *rest: seen.append(type(o).__name__))
    try:
        optimizer.step(model.losses())
    finally:
        handle.remove()
    assert seen == ["AdamW", "MTLOptimizer"]


def test_unhooked_dictionaries_are_there_after_unpickling() -> None:
    optimizer = pickle.loads(pickle.dumps(adam(Toy())))
    assert isinstance(optimizer._optimizer_step_pre_hooks, OrderedDict)
    optimizer.register_step_pre_hook(lambda o, args, kwargs: None)


def test_zero_grad_in_both_ways() -> None:
    model = Toy()
    optimizer = adam(model)
    optimizer.backward(model.losses())
    optimizer.zero_grad(set_to_none=False)
    assert all(g is not None and not g.any() for g in grads(model))
    optimizer.zero_grad()
    assert grads(model) == [None] * 10


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, within torch
def test_a_step_under_torch_compile() -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model), wrapped(plain)
    optimizer.backward(model.losses())
    torch.compile(lambda: optimizer.step(), backend="eager")()
    reference.step(plain.losses())
    assert_same(model.parameters(), plain.parameters(), 1e-12)
