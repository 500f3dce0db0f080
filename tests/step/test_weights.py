"""Heads, scale, weights that are reused, tensors that are learned."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from cases import ONE_BATCH
from models import (
    PUBLISHED,
    Counted,
    Fixed,
    Inverse,
    Toy,
    assert_same,
    expected_grads,
    frozen_copy,
    grads,
    lone_rows,
    param,
    square,
    wrapped,
)
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.rules._base import Context, GradientRule, GramRule, LossRule, Weights

WEIGHTS = (0.5, 2.0, -1.0)


@dataclass(frozen=True)
class ByLoss(LossRule):
    """Given weights from a rule that looks at losses."""

    def weights(self, losses: Tensor, ctx: Context) -> Tensor:
        return losses.new_tensor(WEIGHTS)


@dataclass(frozen=True)
class Apart(GramRule):
    """Weights that differ between trunk and heads."""

    scale: ClassVar[Any] = "mean"

    def weights(self, gram: Tensor, ctx: Context) -> Weights:
        return Weights(gram.new_tensor(WEIGHTS), gram.new_tensor((3.0, 4.0, 5.0)))


HEADS = [
    (ByLoss(), None, WEIGHTS),
    (ByLoss(), "plain", (1, 1, 1)),
    (ByLoss(), "weighted", WEIGHTS),
    (Fixed(WEIGHTS), None, (1, 1, 1)),
    (Fixed(WEIGHTS), "plain", (1, 1, 1)),
    (Fixed(WEIGHTS), "weighted", WEIGHTS),
    (Apart(), None, (3.0, 4.0, 5.0)),
    (Apart(), "plain", (1, 1, 1)),
    (Apart(), "weighted", (3.0, 4.0, 5.0)),
]


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize(("rule", "heads", "factors"), HEADS)
def test_heads(rule: Any, heads: str | None, factors: tuple[float, ...], engine: str) -> None:
    model = Toy()
    wrapped(model, rule, heads=heads, scale="native", engine=engine).backward(model.losses())
    trunk = list(model.trunk.parameters())
    rows = lone_rows(model.losses(), [*trunk, *model.heads.parameters()])
    wanted = [sum(w * row[i] for w, row in zip(WEIGHTS, rows, strict=True)) for i in range(4)]
    assert_same(grads(trunk), wanted)
    for task, head in enumerate(model.heads):
        own = rows[task][4 + 2 * task : 6 + 2 * task]
        assert_same(grads(head), [factors[task] * g for g in own])


@pytest.mark.parametrize("name", ONE_BATCH)
def test_default_of_the_heads(name: str) -> None:
    """Plain where the rule says so, else times the weights that are on record."""
    model = Toy()
    optimizer = wrapped(model, name, lr=0.0)
    for batch in range(2):
        optimizer.step(model.losses(batch))
    found, plain, record = grads(model.heads), [], optimizer.last
    assert record is not None
    for task, row in enumerate(lone_rows(model.losses(1), list(model.heads.parameters()))):
        plain += row[2 * task : 2 * task + 2]
    assert (record.heads is None) == (make_rule(name).heads == "plain")
    weights = [1.0] * 3 if record.heads is None else record.heads.tolist()
    assert_same(found, [weights[i // 2] * g for i, g in enumerate(plain)])


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
def test_head_of_a_task_with_nothing_shared_keeps_its_plain_gradient(engine: str) -> None:
    """The others' heads are weighted, and the rule has no weight for this one."""
    model, own = Toy(2), param(3, seed=4)
    optimizer = wrapped([*model.parameters(), own], "nash_mtl", engine=engine)
    a, b = model.losses()
    optimizer.backward({"a": a, "own": (own - 1).square().sum(), "b": b})
    assert_same([own.grad], [2 * (own - 1)])
    assert optimizer.last is not None
    assert optimizer.last.heads is not None
    weights = optimizer.last.heads.tolist()
    assert weights[1] == 1
    assert 1 not in (weights[0], weights[2])
    rows = lone_rows(model.losses(), list(model.heads.parameters()))
    plain = [*rows[0][:2], *rows[1][2:]]
    factors = [weights[0]] * 2 + [weights[2]] * 2
    wanted = [f * g for f, g in zip(factors, plain, strict=True) if g is not None]
    assert_same(grads(model.heads), wanted)


@pytest.mark.parametrize("name", ONE_BATCH)
def test_scale(name: str) -> None:
    """Sum is the number of present tasks times native for rules like a mean, else the same."""
    found = {}
    for scale in ("sum", "native"):
        model = Toy()
        wrapped(model, name, scale=scale).backward(model.losses())
        found[scale] = grads(model.trunk)
    factor = 3 if make_rule(name).scale == "mean" else 1
    assert_same(found["sum"], [factor * g for g in found["native"] if g is not None], 1e-12)


@pytest.mark.parametrize("n_tasks", [2, 3])
def test_scale_of_a_direction_is_the_number_of_tasks(n_tasks: int) -> None:
    @dataclass(frozen=True)
    class Mean(GradientRule):
        scale: ClassVar[Any] = "mean"

        def direction(self, grads: Any, indices: Any, ctx: Context) -> list[Tensor]:
            return [g.mean(dim=0) for g in grads]

    model, plain = Toy(n_tasks), Toy(n_tasks)
    wrapped(model, Mean(), scale="sum").backward(model.losses())
    sum(plain.losses()).backward()
    assert_same(grads(model), grads(plain))


@pytest.mark.parametrize("name", ["upgrad", "mgda", "cagrad", "imtl_g", "pcgrad"])
def test_scale_of_equal_gradients_is_that_of_the_sum(name: str) -> None:
    """With one and the same loss three times, the script's learning rate carries over."""
    weight, plain = param(4, seed=1), param(4, seed=1)
    optimizer = wrapped(
        [weight], make_rule(name, **({"rescale": None, "c": 0.0} if name == "cagrad" else {}))
    )
    optimizer.backward([weight.square().sum() for _ in range(3)])
    (3 * plain.square().sum()).backward()
    assert_same([weight.grad], [plain.grad], 1e-9)


def test_native_is_aggregate() -> None:
    model = Toy()
    params = list(model.parameters())
    for rule in ("upgrad", "mgda", "cagrad", "nash_mtl", "imtl_g", "gradvac", "pcgrad"):
        wanted = expected_grads(model.losses(), params, rule, scale="native")
        wrapped(model, rule, scale="native", heads="plain").backward(model.losses())
        assert_same(grads(params), wanted, 1e-9)
        model.zero_grad()


# ---------------------------------------------------------------------- update_every


class Passing(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.passes = Counted()

    def forward(self, x: Tensor) -> list[Tensor]:
        z = self.trunk[2](self.passes.watch("trunk", self.trunk[0](x)).tanh()).tanh()
        return [head(z) for head in self.heads]

    def count(self) -> int:
        return self.passes.counts.pop("trunk", 0)


@pytest.mark.parametrize("heads", ["plain", "weighted"])
@pytest.mark.parametrize("rule", ["upgrad", "nash_mtl", "gradnorm"])
def test_weights_are_solved_every_kth_step_and_reused_with_one_pass(rule: str, heads: str) -> None:
    model = Passing()
    optimizer = wrapped(model, rule, update_every=3, heads=heads, lr=0.01)
    passes, weights, solved = [], [], []
    for batch in range(7):
        optimizer.step(model.losses(batch))
        passes.append(model.count())
        assert optimizer.last is not None
        weights.append(frozen_copy(optimizer.last.weights))
        solved.append(optimizer.core.contents()["step"]["solved"])
    assert passes == [3, 1, 1, 3, 1, 1, 3]
    assert solved == [1, 1, 1, 2, 2, 2, 3]
    assert weights[0] == weights[1] == weights[2] != weights[3] == weights[5] != weights[6]


@pytest.mark.parametrize("heads", ["plain", "weighted"])
def test_reused_weights_give_the_same_gradient_as_m_passes(heads: str) -> None:
    model, reference = Toy(), Toy()
    optimizer = wrapped(model, Inverse(), update_every=4, heads=heads)
    for batch in range(4):
        optimizer.step(model.losses(batch))
        if batch == 0:
            assert optimizer.last is not None
            assert optimizer.last.weights is not None
            fixed = Fixed(tuple(optimizer.last.weights.tolist()))
            second = wrapped(reference, fixed, heads=heads)
        second.step(reference.losses(batch))
        assert_same(model.parameters(), reference.parameters(), 1e-12)


def test_state_and_generator_advance_only_on_solves() -> None:
    model = Toy()
    for rule in ("rlw", "uw", "dwa", "pcgrad", "gradvac"):
        optimizer = wrapped(model, rule, update_every=3, lr=0.01)
        optimizer.step(model.losses())
        before = frozen_copy([optimizer.core.contents()[k] for k in ("generator", "state")])
        for batch in (1, 2):
            optimizer.step(model.losses(batch))
            after = [optimizer.core.contents()[k] for k in ("generator", "state")]
            assert frozen_copy(after) == before
        optimizer.step(model.losses(3))
        after = [optimizer.core.contents()[k] for k in ("generator", "state")]
        assert frozen_copy(after) != before


def test_a_task_that_the_last_solve_did_not_cover_triggers_one() -> None:
    model = Passing()
    optimizer = wrapped(model, "upgrad", update_every=100)
    passes = []
    for names in ("ab", "ab", "a", "b", "abc", "ac", "abc"):
        losses = model.named()
        optimizer.step({name: losses[name] for name in names})
        passes.append(model.count())
    assert passes == [2, 1, 1, 1, 3, 1, 1]
    assert optimizer.core.contents()["step"]["solved"] == 2


def test_held_weights_are_dropped_when_a_task_joins() -> None:
    """Also where there is nothing to solve for the new task alone."""
    model, own = Passing(), param(3, seed=4)
    optimizer = wrapped([*model.parameters(), own], "upgrad", update_every=3)
    passes = []
    for names in ("ab", "d", "ab", "ab"):
        losses = {**model.named(), "d": square(own - 1)}
        optimizer.step({name: losses[name] for name in names})
        passes.append(model.count())
    assert passes == [2, 0, 2, 1]


def test_update_every_counts_windows_of_accumulated_pieces() -> None:
    model = Toy()
    optimizer = wrapped(model, "nash_mtl", update_every=2)
    solved = []
    for window in range(4):
        optimizer.backward([loss / 2 for loss in model.losses(2 * window)], accumulate=True)
        optimizer.backward([loss / 2 for loss in model.losses(2 * window + 1)])
        optimizer.step()
        optimizer.zero_grad()
        solved.append(optimizer.core.contents()["step"]["solved"])
    assert solved == [1, 1, 2, 2]


# ---------------------------------------------------------------------- learned tensors


def learned(optimizer: MTLOptimizer, name: str) -> Tensor:
    return optimizer.core.contents()["state"]["groups"]["model"][name]


def test_uncertainty_by_sgd_worked_out_by_hand() -> None:
    """Loss i is constant in s, so s follows s - lr (1/2 - 1/2 exp(-s) L)."""
    weight = param(1)
    optimizer = wrapped([weight], PUBLISHED["uw"], lr=0.2)
    s, losses = [0.0, 0.0], [3.0, 0.25]
    for _ in range(3):
        optimizer.step([value + 0.0 * weight.sum() for value in losses])
        s = [a - 0.2 * (0.5 - 0.5 * math.exp(-a) * v) for a, v in zip(s, losses, strict=True)]
        assert_same(
            [learned(optimizer, "log_variance")], [torch.tensor(s, dtype=torch.float64)], 1e-12
        )


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_learned_tensors_follow_torchs_own_optimizer(name: str, base: Any) -> None:
    model, plain = Toy(), Toy()
    optimizer = MTLOptimizer(base(model.parameters(), lr=0.05), PUBLISHED[name])
    scales = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    reference = base([*plain.parameters(), scales], lr=0.05)
    for batch in range(8):
        optimizer.step(model.losses(batch))
        losses = torch.stack(plain.losses(batch))
        total = (
            (-scales).exp() * losses / 2 + scales / 2
            if name == "uw"
            else (scales.exp() * losses - scales)
        )
        reference.zero_grad()
        total.sum().backward()
        reference.step()
        assert_same(model.parameters(), plain.parameters(), 1e-10)
        key = {"uw": "log_variance", "imtl_l": "log_scale"}[name]
        assert_same([learned(optimizer, key)], [scales], 1e-10)


@pytest.mark.parametrize("name", ["uw", "imtl_l", "imtl", "gradnorm", "famo"])
def test_param_groups_do_not_change(name: str) -> None:
    model = Toy()
    optimizer = wrapped(model, name)
    before = [len(group["params"]) for group in optimizer.param_groups]
    for batch in range(3):
        optimizer.step(model.losses(batch))
    assert [len(group["params"]) for group in optimizer.param_groups] == before == [10]
    assert not optimizer.state_dict()["state"]


def test_learned_tensors_follow_the_live_learning_rate() -> None:
    steps = []
    for lr in (0.1, 0.3):
        model = Toy()
        optimizer = wrapped(model, PUBLISHED["uw"], lr=0.1)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(model.losses())
        steps.append(learned(optimizer, "log_variance"))
    assert_same([3 * steps[0]], [steps[1]], 1e-12)


def test_learned_lr_takes_the_place_of_the_live_one() -> None:
    model = Toy()
    optimizer = wrapped(model, PUBLISHED["uw"], lr=0.1, learned_lr=0.4)
    for _ in range(2):
        optimizer.param_groups[0]["lr"] *= 0.5
    losses = torch.stack(model.losses()).detach()
    optimizer.step(model.losses())
    assert_same([learned(optimizer, "log_variance")], [-0.4 * (0.5 - 0.5 * losses)], 1e-12)


def test_learned_tensors_wait_for_the_step() -> None:
    model = Toy()
    optimizer = wrapped(model, PUBLISHED["uw"])
    optimizer.backward(model.losses())
    assert not learned(optimizer, "log_variance").any()
    optimizer.step()
    once = learned(optimizer, "log_variance")
    assert once.any()
    optimizer.step()
    assert torch.equal(learned(optimizer, "log_variance"), once)


def test_zero_grad_clears_what_learned_tensors_wait_for() -> None:
    model = Toy()
    optimizer = wrapped(model, PUBLISHED["uw"])
    optimizer.backward(model.losses())
    optimizer.zero_grad()
    optimizer.step()
    assert not learned(optimizer, "log_variance").any()


def test_the_models_own_zero_grad_clears_them_with_the_next_backward() -> None:
    """Only the second pass counts, as it does for the parameters."""
    found = []
    for batches in ((0, 1), (1,)):
        model = Toy()
        optimizer = wrapped(model, PUBLISHED["uw"])
        for batch in batches:
            model.zero_grad()
            optimizer.backward(model.losses(batch))
        optimizer.step()
        found.append([learned(optimizer, "log_variance"), *model.parameters()])
    assert_same(found[0], found[1], 1e-12)
    assert found[0][0].any()


def test_elementwise_rule_sees_the_rows_of_every_parameter() -> None:
    seen: dict[int, Tensor] = {}

    @dataclass(frozen=True)
    class Look(GradientRule):
        def direction(self, grads: Any, indices: Any, ctx: Context) -> list[Tensor]:
            seen.update(zip(indices, (g.clone() for g in grads), strict=True))
            return [g.sum(dim=0) for g in grads]

    model = Toy()
    wrapped(model, Look()).backward(model.losses())
    params = list(model.parameters())
    rows = lone_rows(model.losses(), params)
    assert sorted(seen) == [0, 1, 2, 3]
    for number, stack in seen.items():
        assert_same(stack.unbind(), [row[number] for row in rows])
    plain = Toy()
    sum(plain.losses()).backward()
    assert_same(grads(model), grads(plain))


def test_nash_clips_what_is_shared_and_not_the_heads() -> None:
    model = Toy()
    rows = lone_rows(model.losses(), list(model.trunk.parameters()))
    matrix = torch.stack([torch.cat([g.reshape(-1) for g in r if g is not None]) for r in rows])
    free = aggregate(matrix, make_rule("nash_mtl", max_norm=None))
    optimizer = wrapped(model, make_rule("nash_mtl", max_norm=0.5))
    optimizer.backward(model.losses())
    found = torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters()])
    assert float(found.norm()) == pytest.approx(0.5)
    assert optimizer.last is not None
    assert_same([optimizer.last.heads], [free.weights], 1e-8)
