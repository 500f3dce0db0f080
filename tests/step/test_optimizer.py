"""What else users call: records, metrics, check, explain, epochs, results of a step."""

import math
import re
from typing import Any

import pytest
import torch
from cases import ONE_BATCH
from models import (
    Fixed,
    Toy,
    assert_same,
    data,
    everything,
    expected_grads,
    frozen_copy,
    grads,
    jacobian,
    lone_rows,
    param,
    square,
    wrapped,
)
from torch import Tensor, nn

from gradbal import MTLOptimizer, engines, make_rule

ALL = pytest.mark.parametrize("rule", ONE_BATCH)


def test_the_two_lines_of_the_readme() -> None:
    model = Toy()
    mtl_opt = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), "upgrad")
    start = sum(model.losses()).item()
    for _ in range(40):
        mtl_opt.step(model.named())
    assert sum(model.losses()).item() < 0.7 * start


@ALL
def test_every_rule_trains(rule: str) -> None:
    model = Toy()
    mtl_opt = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), rule)
    start = sum(model.losses()).item()
    for _ in range(60):
        mtl_opt.step(model.named())
    assert sum(model.losses()).item() < 0.85 * start


def test_upgrad_lowers_every_loss_to_first_order() -> None:
    """J d >= 0: no directional derivative along the step is positive."""
    for seed in range(5):
        model = Toy(seed=seed)
        optimizer = wrapped(model, "upgrad", shared=model)
        optimizer.backward(model.losses())
        params = list(model.parameters())
        matrix = jacobian(lone_rows(model.losses(), params), params, range(10))
        direction = torch.cat([p.grad.reshape(-1) for p in params])
        assert bool((matrix @ direction >= -1e-12 * matrix.norm()).all())


def test_record_of_a_step() -> None:
    model = Toy()
    optimizer = wrapped(model, Fixed((1.0, 2.0, 3.0)))
    assert optimizer.last is None
    assert set(optimizer.metrics()) <= {"gradbal/skipped"}
    losses = model.named()
    optimizer.step(losses)
    record = optimizer.last
    assert record is not None
    assert record.tasks == ("a", "b", "c")
    assert_same([record.losses], [torch.stack(list(losses.values())).detach()], 1e-14)
    assert_same([record.weights], [torch.tensor([1.0, 2.0, 3.0]).double()], 0)
    assert not record.skipped
    assert record.grams["model"].shape == (3, 3)


def test_metrics_worked_out_by_hand() -> None:
    weight = param(2)
    weight.data = torch.tensor([1.0, 1.0]).double()
    optimizer = wrapped([weight], "mgda", lr=0.0)
    rows = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]]).double()
    optimizer.step({name: row @ weight + 5 for name, row in zip("abc", rows, strict=True)})
    found = {key: float(value) for key, value in optimizer.metrics().items()}
    wanted = {
        "gradbal/loss/a": 8,
        "gradbal/loss/b": 7,
        "gradbal/loss/c": 4,
        "gradbal/norm/a": 3,
        "gradbal/norm/b": 2,
        "gradbal/norm/c": 1,
        "gradbal/cos/a/b": 0,
        "gradbal/cos/a/c": -1,
        "gradbal/cos/b/c": 0,
        "gradbal/min_cos": -1,
        "gradbal/conflict_share": 1 / 3,
        "gradbal/weight/a": 3 * 0.25,
        "gradbal/weight/b": 0,
        "gradbal/weight/c": 3 * 0.75,
    }
    assert {k: pytest.approx(found[k], abs=1e-9) for k in wanted} == wanted
    assert set(found) - set(wanted) <= {"gradbal/residual", "gradbal/skipped"}


@ALL
def test_metrics_are_flat_scalars_without_graph(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    for batch in range(2):
        optimizer.step(model.named(batch))
    metrics = optimizer.metrics()
    assert {f"gradbal/loss/{task}" for task in "abc"} <= set(metrics)
    for key, value in metrics.items():
        assert re.fullmatch(r"[a-z0-9_/.\-]+", key)
        assert isinstance(value, Tensor)
        assert value.ndim == 0
        assert not value.requires_grad
        assert math.isfinite(value)


def test_single_cosines_up_to_eight_tasks() -> None:
    for n_tasks, pairs in ((8, 28), (9, 0)):
        model = Toy(n_tasks)
        optimizer = wrapped(model, "mgda")
        optimizer.step(model.losses())
        cosines = [key for key in optimizer.metrics() if key.startswith("gradbal/cos/")]
        assert len(cosines) == pairs
        assert "gradbal/min_cos" in optimizer.metrics()


def test_metrics_of_a_skipped_step() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", on_nonfinite="skip")
    losses = model.named()
    losses["a"] = losses["a"] * float("nan")
    assert float(optimizer.metrics()["gradbal/skipped"]) == 0
    optimizer.step(losses)
    assert optimizer.last is not None
    assert optimizer.last.skipped
    assert float(optimizer.metrics()["gradbal/skipped"]) == 1
    assert all(value.ndim == 0 for value in optimizer.metrics().values())


def test_record_of_one_step_does_not_change_in_the_next() -> None:
    model = Toy()
    optimizer = wrapped(model, "mgda")
    optimizer.step(model.losses())
    record = optimizer.last
    assert record is not None
    before = frozen_copy([record.losses, record.weights, record.grams])
    optimizer.step(model.losses(1))
    assert frozen_copy([record.losses, record.weights, record.grams]) == before


# ---------------------------------------------------------------------- check and explain


@pytest.mark.parametrize("engine", ["auto", "sequential", "batched"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_check_finds_nothing_wrong_and_changes_nothing(rule: str, engine: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, engine=engine)
    optimizer.step(model.named())
    before = everything(model, optimizer)
    losses = model.named(1)
    found = optimizer.check(losses)
    assert set(found) == {"a", "b", "c", "sum"}
    assert max(found.values()) <= 1e-12
    assert everything(model, optimizer) == before
    optimizer.step(losses)  # the graph is still there


class Fickle(torch.autograd.Function):
    """Its gradient is right the first time and off by a tenth from then on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.count = 0
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        ctx.count += 1
        return grad * (1.0 if ctx.count == 1 else 1.1)


def test_check_finds_a_pass_that_changes_what_the_next_one_gives() -> None:
    weight, own = param(3, seed=1), [param(3, seed=2 + k) for k in range(2)]

    def losses() -> dict[str, Tensor]:
        z = Fickle.apply(weight * 1)
        return {name: square(z * w - 1) for name, w in zip("ab", own, strict=True)}

    optimizer = wrapped([weight, *own], "upgrad")
    with pytest.raises(RuntimeError, match=r"^check: the task gradients of '\w+' deviate by "):
        optimizer.check(losses())


def test_explain_changes_nothing_and_says_what_is_shared() -> None:
    model = Toy()
    model.heads[0].bias.requires_grad_(False)
    optimizer = wrapped([*model.trunk.parameters(), *model.heads[:2].parameters()], "upgrad")
    before = everything(model, optimizer)
    losses = model.named()
    text = optimizer.explain(losses)
    assert everything(model, optimizer) == before
    assert "3 tasks share 55 parameters in 4 tensors" in text
    assert "a: 10 parameters in 1 tensors of its own." in text
    assert "c: 0 parameters in 0 tensors of its own." in text
    assert "2 parameters belong to no group and are left alone." in text
    assert "3 passes through the trunk" in text
    optimizer.step(losses)
    assert "Pass the losses" in optimizer.explain()


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["upgrad", "gradvac", "rlw", "uw"])
def test_a_dry_run_before_training_leaves_training_as_it_is(rule: str, engine: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule, engine=engine), wrapped(plain, rule, engine=engine)
    optimizer.explain()
    optimizer.explain(model.named())
    optimizer.check(model.named())
    for batch in range(3):
        optimizer.step(model.named(batch))
        reference.step(plain.named(batch))
    assert_same(model.parameters(), plain.parameters(), 0)
    assert frozen_copy(optimizer.state_dict()) == frozen_copy(reference.state_dict())


def test_explain_names_partly_shared_parameters_and_nested_taps() -> None:
    stem, part = param(4, 4, seed=1), param(4, 4, seed=2)
    own = [param(4, seed=3 + k) for k in range(3)]

    def losses() -> list[Tensor]:
        z = (data(5, 4) @ stem).tanh()
        y = (z @ part).tanh()
        return [square(z * own[0]), square(y * own[1]), square(y * own[2])]

    text = wrapped([stem, part, *own], "mgda").explain(losses())
    assert "16 parameters in 1 tensors are shared by some of the tasks only." in text
    assert "Cut: TanhBackward0." in text


# ---------------------------------------------------------------------- calls


def test_step_returns_what_the_base_returns() -> None:
    model = Toy()
    optimizer = wrapped(model)
    assert optimizer.step(model.losses()) is None
    assert optimizer.step() is None
    value = optimizer.step(lambda: model.losses())
    assert isinstance(value, Tensor)
    assert value.ndim == 0


def test_epochs_reach_the_rules_that_average_over_them() -> None:
    model = Toy()
    optimizer = wrapped(model, make_rule("dwa"), lr=0.05)
    for _ in range(3):
        for batch in range(2):
            optimizer.step(model.losses(batch))
            assert optimizer.last is not None
        optimizer.end_epoch()
    assert optimizer.last.weights is not None
    totals = torch.ones(3)
    assert not torch.equal(optimizer.last.weights.float(), totals)
    assert float(optimizer.last.weights.sum()) == pytest.approx(3)
    assert int(optimizer.core.contents()["step"]["epoch"]) == 3


def test_named_engines_and_classes_are_taken() -> None:
    for engine in ("auto", engines.Auto, engines.Auto(), engines.Batched, engines.Sequential()):
        model = Toy()
        wrapped(model, "upgrad", engine=engine).step(model.losses())


def test_rule_objects_are_taken_and_shown() -> None:
    rule = make_rule("cagrad", c=0.7)
    assert wrapped(Toy(), rule).rule is rule


def test_parameters_given_twice_or_shared_between_modules_count_once() -> None:
    layer = nn.Linear(3, 3).double()
    twice = nn.ModuleList([layer, layer])
    optimizer = wrapped(twice, "mgda")
    x = data(2, 3)
    losses = [square(twice[0](x)), square(twice[1](x) - 1)]
    optimizer.step(losses)
    assert "2 tasks share 12 parameters in 2 tensors" in optimizer.explain(
        [square(twice[0](x)), square(twice[1](x) - 1)]
    )


def test_many_tasks() -> None:
    weight = param(5, 64, seed=1)
    optimizer = wrapped([weight], "upgrad")
    optimizer.step(list((data(7, 5) @ weight).tanh().square().mean(dim=0).unbind()))
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_training_and_evaluating_with_autocast() -> None:
    model, plain = Toy().float(), Toy().float()
    optimizer, reference = wrapped(model, "mgda"), torch.optim.SGD(plain.parameters(), lr=0.1)
    x = data(6, 4, dtype=torch.float32)
    for engine_model in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = [y.float().square().mean() for y in engine_model(x)]
        if engine_model is model:
            optimizer.step(losses)
        else:
            sum(losses).backward()
            reference.step()
    assert {g.dtype for g in grads(model) if g is not None} == {torch.float32}


def test_inside_no_grad_and_inference_blocks() -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model), wrapped(plain)
    losses = model.losses()
    with torch.no_grad():
        optimizer.step(losses)
    reference.step(plain.losses())
    assert_same(model.parameters(), plain.parameters(), 0)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_activations_kept_elsewhere(engine: str) -> None:
    model = Toy()
    with torch.autograd.graph.save_on_cpu():
        losses = model.losses()
    wanted = expected_grads(model.losses(), list(model.parameters()), "upgrad")
    wrapped(model, "upgrad", engine=engine).backward(losses)
    assert_same(grads(model), wanted, 1e-9)


def test_two_optimizers_on_one_model() -> None:
    """As for a discriminator: the losses of one are the auxiliary losses of none."""
    model = Toy()
    first = MTLOptimizer(torch.optim.SGD(model.trunk.parameters(), lr=0.1), "upgrad")
    second = torch.optim.SGD(model.heads.parameters(), lr=0.1)
    losses = model.losses()
    first.backward(losses, retain_graph=True)
    kept = grads(model.trunk)
    second.zero_grad()
    torch.autograd.backward(sum(losses), inputs=list(model.heads.parameters()))
    assert_same(grads(model.trunk), kept, 0)
    first.step()
    second.step()


def test_input_that_requires_a_gradient_is_left_alone() -> None:
    model = Toy()
    x = data(6, 4).requires_grad_()
    losses = [square(y) for y in model(x)]
    wrapped(model, "upgrad").step(losses)
    assert x.grad is None


def test_tensor_hooks_on_parameters_see_rows_or_sums_but_gradients_are_right() -> None:
    model, plain = Toy(), Toy()
    model.trunk[0].weight.register_hook(lambda g: g * 2)
    wrapped(model, "ew").backward(model.losses())
    wrapped(plain, "ew").backward(plain.losses())
    assert_same([model.trunk[0].weight.grad], [2 * plain.trunk[0].weight.grad], 1e-13)


def test_a_recurrent_model_of_many_steps() -> None:
    cell, heads = nn.RNNCell(3, 3).double(), [param(3, seed=k) for k in range(2)]
    optimizer = wrapped([*cell.parameters(), *heads], "mgda")

    def losses() -> list[Tensor]:
        h = torch.zeros(1, 3).double()
        for t in range(400):
            h = cell(data(1, 3, seed=t), h)
        return [square(h * w - 1) for w in heads]

    optimizer.step(losses())
    assert max(optimizer.check(losses()).values()) <= 1e-10


def test_new_numbers_per_task_at_the_end_of_an_epoch() -> None:
    model, plain = Toy(), Toy()
    optimizer, other = wrapped(model, "pivrg"), wrapped(plain, make_rule("pivrg", scores=(9, 0, 3)))
    optimizer.step(model.named())
    with pytest.raises(ValueError, match="one number for each of the tasks a, b, c, got"):
        optimizer.end_epoch(scores={"a": 9})
    with pytest.raises(ValueError, match="'score' is no option with one number per task"):
        optimizer.end_epoch(score=[1, 2, 3])
    optimizer.end_epoch(scores={"b": 0, "a": 9, "c": 3})
    plain.load_state_dict(model.state_dict())
    for one, net in ((optimizer, model), (other, plain)):
        one.zero_grad()
        one.backward(net.named(1))
    assert_same(grads(model), grads(plain))
    with pytest.raises(RuntimeError, match="can be given anew after the first step"):
        wrapped(Toy(), "pivrg", tasks=["a", "b", "c"]).end_epoch(scores=[1, 2, 3])
