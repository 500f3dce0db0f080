"""Several optimizers under one ``MTLOptimizer``, each compared with stepping them by hand."""

import copy
import pickle
from typing import Any

import pytest
import torch
from models import Toy, assert_same, frozen_copy, grads, param, says, wrapped
from torch import Tensor, nn, optim
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedulers

from gradbal import MTLOptimizer
from gradbal.optim.several import SeveralOptimizers


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the matrices and the rest."""
    params = list(model.parameters())
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]


class Momentum(SGD):
    """Stands for Muon before torch 2.9."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr, momentum=0.9)


Muon: Any = getattr(optim, "Muon", Momentum)


def bases(model: nn.Module) -> tuple[Any, AdamW]:
    matrices, rest = split(model)
    return Muon(matrices, lr=0.02), AdamW(rest, lr=0.01)


def both(model: nn.Module, rule: Any = "upgrad", **options: Any) -> MTLOptimizer:
    return MTLOptimizer(bases(model), rule, **options)


class ByHand:
    """The same gradients, and the two optimizers stepped one after the other."""

    def __init__(self, rule: str) -> None:
        self.model = Toy()
        matrices, rest = split(self.model)
        self.gradients = wrapped([*matrices, *rest], rule, lr=0.0)  # in the same order
        self.bases = bases(self.model)

    def step(self, batch: int, clip: float | None = None) -> None:
        self.gradients.zero_grad()
        self.gradients.backward(self.model.losses(batch))
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for base in self.bases:
            base.step()
        self.gradients.step()  # at a learning rate of 0, for rules that learn


@pytest.mark.parametrize("rule", ["ew", "upgrad", "pcgrad", "nash_mtl", "graddrop"])
def test_each_steps_its_own_parameters(rule: str) -> None:
    reference, model = ByHand(rule), Toy()
    optimizer = both(model, rule)
    for batch in range(4):
        optimizer.step(model.losses(batch))
        reference.step(batch)
        assert_same(model.parameters(), reference.model.parameters(), 0)


def test_a_list_of_one_is_that_optimizer() -> None:
    model, plain = Toy(), Toy()
    ours = MTLOptimizer([AdamW(model.parameters(), lr=0.01)], "uw")
    reference = MTLOptimizer(AdamW(plain.parameters(), lr=0.01), "uw")
    for batch in range(3):
        ours.step(model.losses(batch))
        reference.step(plain.losses(batch))
    assert_same(model.parameters(), plain.parameters(), 0)
    assert ours.defaults == reference.defaults


def test_groups_and_state_are_those_of_the_optimizers() -> None:
    model = Toy()
    muon, adam = bases(model)
    optimizer = MTLOptimizer([muon, adam])
    assert [id(g) for g in optimizer.param_groups] == [
        id(muon.param_groups[0]),
        id(adam.param_groups[0]),
    ]
    optimizer.step(model.losses())
    weight, bias = model.trunk[0].weight, model.trunk[0].bias
    assert optimizer.state[weight] is muon.state[weight]
    assert optimizer.state[bias] is adam.state[bias]
    assert set(optimizer.state) == {*muon.state, *adam.state}
    assert len(optimizer.state) == 10
    assert weight in optimizer.state
    assert torch.ones(2) not in optimizer.state
    optimizer.state[bias] = {"mine": 1}
    assert adam.state[bias] == {"mine": 1}
    del optimizer.state[bias]
    assert bias not in adam.state
    with pytest.raises(KeyError):
        optimizer.state[torch.ones(2)]
    optimizer.param_groups = copy.copy(optimizer.param_groups)
    optimizer.param_groups[1]["lr"] = 0.5
    assert adam.param_groups[0]["lr"] == 0.5
    optimizer.state = {bias: {"step": torch.zeros(())}}
    assert not muon.state
    assert list(adam.state) == [bias]


def test_defaults_are_what_all_have() -> None:
    optimizer = both(Toy())
    assert set(optimizer.defaults) == set(Muon([param(2, 2)]).defaults) & set(
        AdamW([param(2)]).defaults
    )
    assert optimizer.defaults["lr"] == 0.02
    optimizer.defaults = {"lr": 1.0}
    assert optimizer.base.defaults == {"lr": 1.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda o: schedulers.StepLR(o, 2, 0.5),
        lambda o: schedulers.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
        lambda o: schedulers.CosineAnnealingLR(o, 4),
        lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=6, cycle_momentum=False),
        lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    ],
)
def test_a_scheduler_on_all_is_one_on_each(make: Any) -> None:
    reference, model = ByHand("mgda"), Toy()
    optimizer = both(model, "mgda")
    ours, theirs = make(optimizer), [make(base) for base in reference.bases]
    for batch in range(5):
        optimizer.step(model.losses(batch))
        reference.step(batch)
        for schedule in (ours, *theirs):
            plateau = isinstance(schedule, schedulers.ReduceLROnPlateau)
            schedule.step(*([1.0] if plateau else []))
        assert [g["lr"] for g in optimizer.param_groups] == [
            base.param_groups[0]["lr"] for base in reference.bases
        ]
        assert_same(model.parameters(), reference.model.parameters(), 0)


def test_momentum_that_not_all_have_cannot_be_scheduled() -> None:
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        schedulers.OneCycleLR(both(Toy()), 0.1, total_steps=6)


def test_a_scheduler_on_one_of_them() -> None:
    reference, model = ByHand("ew"), Toy()
    optimizer = both(model, "ew")
    assert isinstance(optimizer.base, SeveralOptimizers)
    ours = schedulers.StepLR(optimizer.base.optimizers[1], 1, 0.5)
    theirs = schedulers.StepLR(reference.bases[1], 1, 0.5)
    for batch in range(3):
        optimizer.step(model.losses(batch))
        reference.step(batch)
        ours.step()
        theirs.step()
    assert_same(model.parameters(), reference.model.parameters(), 0)


def test_clipping_between_the_phases() -> None:
    reference, model = ByHand("upgrad"), Toy()
    optimizer = both(model)
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch))
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        reference.step(batch, clip=0.1)
    assert_same(model.parameters(), reference.model.parameters(), 0)


def test_a_scaler_over_all_of_them() -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = both(model), both(plain)
    scaler = GradScaler("cpu", init_scale=1024.0)
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        reference.step(plain.losses(batch))
    assert_same(model.parameters(), plain.parameters(), 1e-12)
    before = frozen_copy(dict(model.state_dict()))
    optimizer.backward([loss * float("inf") for loss in model.losses()], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert frozen_copy(dict(model.state_dict())) == before
    assert scaler.get_scale() == 512


def test_a_closure_is_evaluated_once() -> None:
    reference, model = ByHand("mgda"), Toy()
    optimizer = both(model, "mgda")
    for batch in range(3):
        calls = []

        def closure(batch: int = batch, calls: list[int] = calls) -> list[Tensor]:
            calls.append(batch)
            return model.losses(batch)

        optimizer.step(closure)
        reference.step(batch)
        assert len(calls) == 1
    assert_same(model.parameters(), reference.model.parameters(), 0)


@pytest.mark.parametrize("rule", ["uw", "gradvac", "rlw"])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
def test_stop_and_go_on(rule: str, way: str) -> None:
    straight, stopped = Toy(), Toy()
    ours, optimizer = both(straight, rule), both(stopped, rule)
    for batch in range(4):
        ours.step(straight.losses(batch))
        optimizer.step(stopped.losses(batch))
        if way == "state_dict":
            saved = copy.deepcopy([stopped.state_dict(), optimizer.state_dict()])
            stopped = Toy(seed=9)
            optimizer = both(stopped, rule, seed=9)
            stopped.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        elif way == "pickle":
            stopped, optimizer = pickle.loads(pickle.dumps((stopped, optimizer)))
        else:
            stopped, optimizer = copy.deepcopy((stopped, optimizer))
        assert frozen_copy(optimizer.state_dict()) == frozen_copy(ours.state_dict())
        assert_same(stopped.parameters(), straight.parameters(), 0)


def test_the_checkpoint_has_the_form_of_any_optimizers() -> None:
    model = Toy()
    optimizer = both(model)
    optimizer.step(model.losses())
    state = optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "gradbal"}
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    assert numbers == list(range(10)) == sorted(state["state"])


def test_distributed_checkpoints_go_by_name() -> None:
    model, other = Toy(), Toy(seed=1)
    optimizer, second = both(model), both(other)
    for batch in range(2):
        optimizer.step(model.losses(batch))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert "trunk.0.weight" in saved["state"]
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, second, saved)
    second.core.load_state_dict(optimizer.core.state_dict())
    optimizer.step(model.losses(2))
    second.step(other.losses(2))
    assert_same(other.parameters(), model.parameters(), 0)


def test_a_group_goes_where_it_is_told_to() -> None:
    model, extra = Toy(), param(2, 2)
    optimizer = both(model)
    schedule = schedulers.StepLR(optimizer, 1, 0.5)
    optimizer.add_param_group({"params": [extra], "lr": 0.25, "optimizer": 0})
    muon, adam = optimizer.base.optimizers  # type: ignore[attr-defined]  # several
    assert len(muon.param_groups) == 2
    assert "optimizer" not in muon.param_groups[1]
    before = extra.detach().clone()
    optimizer.step([loss + extra.square().sum() for loss in model.losses()])
    assert not torch.equal(extra.detach(), before)
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.125, 0.005]
    adam.add_param_group({"params": [param(3)]})
    assert optimizer.param_groups[3] is adam.param_groups[1]


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    model = Toy()
    optimizer = both(model)
    optimizer.step(model.losses())
    before = frozen_copy(optimizer.state_dict())
    matrices, rest = split(Toy())
    for bad, sizes in (
        ([Muon(matrices[:2]), AdamW(rest)], [2, 5]),
        ([AdamW([*rest, *matrices])], [10]),
        ([AdamW(rest), AdamW(matrices[:4]), AdamW(matrices[4:])], [5, 4, 1]),
    ):
        says(
            ValueError,
            f"Checkpoint: its groups have {sizes} parameters, those of these optimizers [5, 5]; "
            "build them as they were when it was saved.",
            lambda bad=bad: optimizer.load_state_dict(MTLOptimizer(bad).state_dict()),
        )
        assert frozen_copy(optimizer.state_dict()) == before


@pytest.mark.skipif(
    not hasattr(optim, "swap_in_optimizer_params_and_state"), reason="of a later torch"
)
@pytest.mark.parametrize("several", [True, False])
def test_parameters_and_state_swapped_for_a_while(several: bool) -> None:
    """Torch's way to trace a step: others are stepped meanwhile, and all is put back."""

    def start() -> tuple[Toy, MTLOptimizer]:
        model = Toy()
        base = bases(model) if several else AdamW(model.parameters(), lr=0.01)
        optimizer = MTLOptimizer(base, "mgda")
        optimizer.step(model.losses())
        return model, optimizer

    model, optimizer = start()
    _, reference = start()
    before = frozen_copy([dict(model.state_dict()), optimizer.state_dict()])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    copies = {str(k): p.detach().clone().requires_grad_() for k, p in enumerate(params)}
    state = copy.deepcopy(optimizer.base.state_dict())
    for own in copies.values():
        own.grad = torch.ones_like(own)
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, copies, state):
        optimizer.step()
    assert frozen_copy([dict(model.state_dict()), optimizer.state_dict()]) == before
    theirs = [p for group in reference.param_groups for p in group["params"]]
    for p in theirs:
        p.grad = torch.ones_like(p)
    reference.step()
    assert_same(copies.values(), theirs, 0)
    optimizer.step(model.losses(1))


def test_hooks_and_clearing() -> None:
    model = Toy()
    optimizer, called = both(model), list[str]()
    optimizer.base.register_step_post_hook(lambda *args: called.append("step"))
    optimizer.base.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    optimizer.base.register_load_state_dict_pre_hook(
        lambda o, d: {k: v for k, v in d.items() if k != "mine"}
    )
    optimizer.step(model.losses())
    state = optimizer.state_dict()
    assert state["mine"] == 1
    optimizer.load_state_dict(state)
    assert called == ["step"]
    optimizer.zero_grad(set_to_none=False)
    assert all(g is not None and not g.any() for g in grads(model))
    optimizer.zero_grad()
    assert grads(model) == [None] * 10
    assert f"base=SeveralOptimizers({Muon.__name__} (\n" in repr(optimizer)


# ---------------------------------------------------------------------- what goes wrong


def test_what_cannot_be_one_of_several() -> None:
    p, q = param(2, 2), param(2, 2)
    cases: list[tuple[type[Exception], Any, str]] = [
        (ValueError, [], "MTLOptimizer: expected at least one torch optimizer, got an empty list."),
        (TypeError, [SGD([p]), 3], "MTLOptimizer: expected plain torch optimizers, got 3."),
        (
            ValueError,
            [SGD([p]), torch.optim.LBFGS([q])],
            "MTLOptimizer: LBFGS evaluates the losses several times in a step, so it cannot be one "
            "of several optimizers; wrap it alone.",
        ),
        (
            ValueError,
            [SGD([p, q]), AdamW([q])],
            "MTLOptimizer: SGD and AdamW share a parameter, which would be stepped twice; give "
            "each parameter to one optimizer.",
        ),
    ]
    for error, optimizers, sentence in cases:
        says(error, sentence, lambda optimizers=optimizers: MTLOptimizer(optimizers))
    with pytest.raises(TypeError, match=r"^MTLOptimizer: expected plain torch optimizers, got "):
        MTLOptimizer([MTLOptimizer(SGD([p])), SGD([q])])


@pytest.mark.parametrize("number", [None, 2, -1, "0"])
def test_a_group_that_does_not_say_where_it_goes(number: Any) -> None:
    optimizer = MTLOptimizer([SGD([param(2)]), SGD([param(2)])])
    says(
        ValueError,
        "MTLOptimizer: a group for one of 2 optimizers must say to which it goes, as in "
        f"{{'params': ..., 'optimizer': 0}}; got optimizer={number!r}.",
        lambda: optimizer.add_param_group({"params": [param(2)], "optimizer": number}),
    )


def test_a_group_whose_parameter_is_taken() -> None:
    p = param(2)
    optimizer = MTLOptimizer([SGD([p]), SGD([param(2)])])
    says(
        ValueError,
        "MTLOptimizer: SGD and SGD share a parameter, which would be stepped twice; give each "
        "parameter to one optimizer.",
        lambda: optimizer.add_param_group({"params": [p], "optimizer": 1}),
    )
    assert len(optimizer.param_groups) == 2
