"""Closures: torch's own, ours, and rules that look at the losses after the step."""

import logging
import re
from typing import Any

import pytest
import torch
from cases import ONE_BATCH, WEIGHTED
from models import Toy, assert_same, data, frozen_copy, grads, square, wrapped
from torch import Tensor, nn

from gradbal import MTLOptimizer, make_rule

ALL = pytest.mark.parametrize("rule", ONE_BATCH)


def lbfgs(model: nn.Module, rule: Any, max_iter: int = 5, **options: Any) -> MTLOptimizer:
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=max_iter)
    return MTLOptimizer(base, rule, **options)


@ALL
def test_closure_that_returns_losses_equals_step_of_losses(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(plain, rule)
    if rule == "famo":  # would look at the losses after the step in the closure
        optimizer, reference = (wrapped(m, make_rule(rule, after="next")) for m in (model, plain))
    for batch in range(3):
        result = optimizer.step(lambda batch=batch: model.named(batch))
        losses = plain.named(batch)
        reference.step(losses)
        assert_same(model.parameters(), plain.parameters(), 1e-12)
        weights = reference.last.weights  # type: ignore[union-attr]  # there was a step
        weights = torch.ones(3).double() if weights is None else weights
        total = weights @ torch.stack(list(losses.values())).detach()
        assert float(result) == pytest.approx(float(total))


@ALL
@pytest.mark.parametrize("kind", ["tensor", "none", "float"])
def test_torchs_own_closure_goes_to_the_base_unchanged(rule: str, kind: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(plain, rule)
    returned: list[Any] = []

    def closure() -> Any:
        optimizer.zero_grad()
        losses = model.named(len(returned))
        optimizer.backward(losses)
        total = sum(losses.values()).detach()
        returned.append({"tensor": total, "none": None, "float": float(total)}[kind])
        return returned[-1]

    for batch in range(3):
        result = optimizer.step(closure) if batch else optimizer.step(closure=closure)
        assert result is returned[-1]
        reference.step(plain.named(batch))
        assert_same(model.parameters(), plain.parameters(), 1e-12)
    ours, theirs = (frozen_copy(o.core.contents()) for o in (optimizer, reference))
    assert ours["state"].keys() == theirs["state"].keys()
    assert ours["step"] == theirs["step"]


def test_gradients_are_enabled_inside_closures() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")

    def closure() -> list[Tensor]:
        assert torch.is_grad_enabled()
        return model.losses()

    with torch.no_grad():
        optimizer.step(closure)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("rule", WEIGHTED)
def test_weights_are_held_while_lbfgs_evaluates(rule: str) -> None:
    model = Toy()
    optimizer = lbfgs(model, rule)
    seen: list[Any] = []
    solved = []
    for batch in range(2):
        seen.clear()

        def closure(batch: int = batch) -> list[Tensor]:
            if optimizer.last is not None:
                seen.append(frozen_copy(optimizer.last.weights))
            return model.losses(batch)

        optimizer.step(closure)
        seen.append(frozen_copy(optimizer.last.weights))  # type: ignore[union-attr]  # stepped
        inside = seen[1:] if batch else seen
        assert len(inside) >= 5
        assert all(weights == inside[0] for weights in inside[:5])
        solved.append(optimizer.core.contents()["step"]["solved"])
    assert solved == [1, 2]


@pytest.mark.parametrize("rule", ["upgrad", "uw", "mgda"])
def test_lbfgs_minimises_one_function_per_step(rule: str) -> None:
    """With the weights held, a step is torch's LBFGS on the weighted sum of the losses."""
    model, plain = Toy(), Toy()
    optimizer = lbfgs(model, rule, scale="native", heads="weighted")
    optimizer.step(lambda: model.losses())
    assert optimizer.last is not None
    assert optimizer.last.weights is not None
    weights = optimizer.last.weights
    reference = torch.optim.LBFGS(plain.parameters(), lr=0.1, max_iter=5)

    def closure() -> Tensor:
        reference.zero_grad()
        total = sum(w * loss for w, loss in zip(weights, plain.losses(), strict=True))
        total.backward()
        return total

    reference.step(closure)
    assert_same(model.parameters(), plain.parameters(), 1e-8)


@pytest.mark.parametrize("rule", ["uw", "imtl_l", "imtl", "gradnorm"])
def test_learned_tensors_step_once_after_lbfgs(rule: str) -> None:
    """The gradient of what is learned is that of the first evaluation."""
    model, plain = Toy(), Toy()
    optimizer = lbfgs(model, make_rule(rule), learned_lr=0.1)
    optimizer.step(lambda: model.losses())
    reference = MTLOptimizer(torch.optim.Adam(plain.parameters()), rule, learned_lr=0.1)
    reference.step(plain.losses())
    ours, theirs = (o.core.contents()["state"]["groups"]["model"] for o in (optimizer, reference))
    assert set(ours) == set(theirs)
    assert_same([ours[k] for k in sorted(ours)], [theirs[k] for k in sorted(ours)], 1e-10)


def test_update_every_counts_steps_not_evaluations() -> None:
    model = Toy()
    optimizer = lbfgs(model, "upgrad", update_every=3)
    solved = []
    for _ in range(7):
        optimizer.step(lambda: model.losses())
        solved.append(optimizer.core.contents()["step"]["solved"])
    assert solved == [1, 1, 1, 2, 2, 2, 3]


def test_elementwise_rules_refuse_lbfgs() -> None:
    with pytest.raises(
        ValueError,
        match=re.escape(
            "MTLOptimizer: GradDrop has no weights that LBFGS could hold while it evaluates the "
            "losses again; choose a rule with weights or another base optimizer."
        ),
    ):
        lbfgs(Toy(), "graddrop")


@pytest.mark.parametrize("closure", [None, lambda: None])
def test_lbfgs_without_a_closure_says_what_to_do(closure: Any) -> None:
    model = Toy()
    with pytest.raises(
        TypeError,
        match=re.escape(
            "MTLOptimizer: LBFGS evaluates the losses several times, so `step` needs a closure "
            "that returns them: `mtl_opt.step(lambda: losses(batch))`."
        ),
    ):
        lbfgs(model, "ew").step(model.losses(), closure=closure)
    with pytest.raises(TypeError, match="LBFGS evaluates the losses several times"):
        lbfgs(model, "ew").step()


@pytest.mark.parametrize("rule", ["uw", "upgrad", "graddrop"])
def test_skipping_inside_a_closure(rule: str) -> None:
    model = Toy()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer = MTLOptimizer(base, rule, on_nonfinite="skip")
    optimizer.step(model.named)
    before = frozen_copy([dict(model.state_dict()), base.state_dict()])
    state = frozen_copy(optimizer.core.contents()["state"])
    optimizer.step(lambda: {k: v * float("nan") for k, v in model.named(1).items()})
    assert frozen_copy([dict(model.state_dict()), base.state_dict()]) == before
    assert frozen_copy(optimizer.core.contents()["state"]) == state


# ---------------------------------------------------------------------- after the step


class Noisy(nn.Module):
    """A model whose forward pass draws random numbers and moves buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).double()
        self.heads = nn.ModuleList(nn.Linear(5, 1).double() for _ in range(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        z = self.trunk(x)
        return [head(z) for head in self.heads]

    def losses(self, batch: int = 0) -> list[Tensor]:
        return [square(y - k - 1) for k, y in enumerate(self(data(6, 4, seed=batch)))]


def noisy() -> Noisy:
    torch.manual_seed(0)
    return Noisy()


def test_the_look_after_the_step_leaves_no_trace() -> None:
    model, plain = noisy(), noisy()
    optimizer = wrapped(model, make_rule("famo", after="closure"))
    reference = wrapped(plain, make_rule("famo", after="next"))
    torch.manual_seed(1)
    optimizer.step(model.losses(), closure=model.losses)
    after, drawn = frozen_copy(dict(model.named_buffers())), torch.rand(3)
    torch.manual_seed(1)
    reference.step(plain.losses())
    assert frozen_copy(dict(plain.named_buffers())) == after
    assert torch.equal(torch.rand(3), drawn)
    assert_same(model.parameters(), plain.parameters(), 0)
    assert int(model.calls) == 1


class Rebinding(Noisy):
    """Replaces a buffer instead of changing it, and uses one of a part that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(4).double())
        self.part = nn.BatchNorm1d(4).double()

    def forward(self, x: Tensor) -> list[Tensor]:
        self.average = 0.9 * self.average + x.mean(dim=0)
        part = self.part
        x = nn.functional.batch_norm(x, part.running_mean, part.running_var, training=True)
        return super().forward(x)


def test_buffers_that_are_rebound_or_belong_to_a_part() -> None:
    model = Rebinding()
    optimizer = wrapped([*model.trunk.parameters(), *model.heads.parameters()], "famo")
    losses = model.losses()
    after = frozen_copy(dict(model.named_buffers()))
    optimizer.step(losses, closure=model.losses)
    assert frozen_copy(dict(model.named_buffers())) == after


def test_the_look_after_the_step_is_one_evaluation_without_gradients() -> None:
    model = Toy()
    optimizer = wrapped(model, "famo")
    modes: list[bool] = []

    def closure() -> list[Tensor]:
        modes.append(torch.is_grad_enabled())
        return model.losses()

    optimizer.step(model.losses(), closure=closure)
    assert modes == [False]
    before = grads(model)
    optimizer.step(closure)
    assert modes == [False, True, False]
    assert all(g is not None for g in before)


def test_a_failing_look_puts_random_numbers_and_buffers_back() -> None:
    model = noisy()
    optimizer = wrapped(model, "famo")

    def closure() -> list[Tensor]:
        model.losses()
        raise KeyError("no more data")

    losses = model.losses()
    buffers, state = frozen_copy(dict(model.named_buffers())), torch.get_rng_state()
    with pytest.raises(KeyError, match="no more data"):
        optimizer.step(losses, closure=closure)
    assert frozen_copy(dict(model.named_buffers())) == buffers
    assert torch.equal(torch.get_rng_state(), state)


def logits(optimizer: MTLOptimizer) -> Tensor:
    return optimizer.core.contents()["state"]["groups"]["model"]["logits"]


def by_hand(before: Tensor, after: Tensor, old: Tensor, gamma: float = 1e-3) -> Tensor:
    """The gradient of FAMO's logits."""
    z = torch.softmax(old, dim=0)
    fall = (before + 1e-8).log() - (after + 1e-8).log()
    return z * (fall - z @ fall) + gamma * old


@pytest.mark.parametrize("way", ["closure", "next"])
def test_famo_worked_out_by_hand(way: str) -> None:
    model = Toy()
    optimizer = wrapped(model, make_rule("famo", after=way))
    wanted = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([wanted], lr=0.025)
    for batch in range(4):
        before = torch.stack(model.losses(batch)).detach()
        optimizer.step(model.losses(batch), closure=lambda batch=batch: model.losses(batch))
        following = batch if way == "closure" else batch + 1
        after = torch.stack(model.losses(following)).detach()
        if way == "closure":
            wanted.grad = by_hand(before, after, wanted.detach())
            adam.step()
            assert_same([logits(optimizer)], [wanted], 1e-10)
        else:
            assert_same([logits(optimizer)], [wanted], 1e-10)
            wanted.grad = by_hand(before, after, wanted.detach())
            adam.step()


def test_famo_without_a_closure_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    optimizer = wrapped(model, "famo")
    with caplog.at_level(logging.INFO, logger="gradbal"):
        for batch in range(3):
            optimizer.step(model.losses(batch))
    assert [record.getMessage() for record in caplog.records] == [
        "FAMO looks at the losses after the step; without a closure it takes those of the next "
        "step, which belong to another batch."
    ]
    assert logits(optimizer).any()


def test_famo_that_insists_on_a_closure() -> None:
    model = Toy()
    optimizer = wrapped(model, make_rule("famo", after="closure"))
    before = frozen_copy(dict(model.state_dict()))
    with pytest.raises(
        RuntimeError,
        match=re.escape(
            'FAMO(after="closure"): `step` needs `closure=`, a function that returns the losses '
            "of the same batch again."
        ),
    ):
        optimizer.step(model.losses())
    assert frozen_copy(dict(model.state_dict())) == before


def test_famo_with_an_absent_task_looks_at_those_that_were_there() -> None:
    model = Toy()
    optimizer = wrapped(model, make_rule("famo", after="next"))
    optimizer.step(model.named(0))
    optimizer.step({"a": model.named(1)["a"], "b": model.named(1)["b"]})
    after_two = logits(optimizer).clone()
    optimizer.step({"b": model.named(2)["b"], "c": model.named(2)["c"]})
    changed = logits(optimizer) != after_two
    assert changed.tolist()[2] is False


def test_famo_under_lbfgs_looks_once_after_the_step() -> None:
    model = Toy()
    optimizer = lbfgs(model, "famo")
    modes: list[bool] = []

    def closure() -> list[Tensor]:
        modes.append(torch.is_grad_enabled())
        return model.losses()

    optimizer.step(closure)
    assert modes.count(False) == 1
    assert modes[-1] is False
    assert modes.count(True) >= 5


def test_a_closure_that_changes_its_tasks_is_told() -> None:
    model = Toy()
    optimizer = MTLOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=3), "upgrad")
    calls = 0

    def closure() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        named = dict(zip("abc", model.losses(), strict=True))
        return named if calls > 1 else {name: named[name] for name in "ab"}

    sentence = (
        "MTLOptimizer: the closure returned losses of other tasks than in its first evaluation of "
        "this step; return those of the same tasks."
    )
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        optimizer.step(closure)
