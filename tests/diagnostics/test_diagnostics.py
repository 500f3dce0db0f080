"""The recorder: what it keeps, what it costs, and that its numbers are those of the gradients."""

import copy
import csv
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import WEIGHTED
from models import (
    Dispatched,
    Toy,
    assert_same,
    everything,
    grads,
    lone_rows,
    param,
    says,
    scaled_step,
    scaler,
    spoiled,
    square,
    wrapped,
)
from torch import Tensor

import gradbal
from gradbal import MTLOptimizer, Recorder, chain, make_rule, rule_names
from gradbal.diagnostics.history import History
from gradbal.diagnostics.step import Step
from gradbal.rules._base import LossRule
from gradbal.step.record import StepRecord

SEEING = [name for name in WEIGHTED if not isinstance(make_rule(name), LossRule)]


def train(optimizer: MTLOptimizer, model: Toy, steps: int, first: int = 0) -> None:
    for batch in range(first, first + steps):
        losses = model.losses(batch)
        more = [lambda: model.losses(0)] * (min(optimizer.rule.batches) - 1)
        if getattr(optimizer.rule, "probes", False):
            optimizer.step(losses, *more)
        else:
            optimizer.step(losses, *(closure() for closure in more))


def table(path: Path) -> list[dict[str, str]]:
    return [*csv.DictReader(path.read_text().splitlines())]


# ---------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("groups", ["model", "tensor"])
@pytest.mark.parametrize("rule", [*SEEING, chain("normalize", "mgda"), chain("smooth", "upgrad")])
def test_direction_against_the_sum_is_that_of_the_gradients(rule: Any, groups: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, groups=groups, heads="plain")
    recorder = Recorder(optimizer)
    losses, trunk = model.losses(), [*model.trunk.parameters()]
    rows = lone_rows(losses, trunk)
    matrix = torch.stack([torch.cat([g.flatten() for g in row if g is not None]) for row in rows])
    optimizer.backward(losses)
    direction = torch.cat([g.flatten() for g in grads(trunk) if g is not None])
    optimizer.step()
    course, total = recorder.course(), matrix.sum(dim=0)
    cosine = torch.cosine_similarity
    assert_same([course.grams[0]], [matrix @ matrix.T])
    assert_same([course.norms[0]], [matrix.norm(dim=1)])
    assert_same([course.cosines[0]], [cosine(matrix[:, None], matrix[None], dim=-1)])
    assert_same([course.slopes[0]], [matrix @ direction])
    assert_same([course.along_direction[0]], [cosine(matrix, direction, dim=-1)], 1e-7)
    assert_same([course.along_sum[0]], [cosine(matrix, total, dim=-1)])
    assert_same([course.cosine_to_sum[0]], [cosine(direction, total, dim=0)])
    assert_same([course.length_to_sum[0]], [direction.norm() / total.norm()])


@pytest.mark.parametrize("rule", rule_names())
def test_every_rule_is_recorded(rule: str, tmp_path: Path) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(plain, rule)
    with Recorder(optimizer) as recorder:
        for number in range(3):
            train(optimizer, model, 1, number)
            train(reference, plain, 1, number)
            assert recorder.steps[-1].record is optimizer.last
    assert everything(model, optimizer) == everything(plain, reference)
    course = recorder.course()
    assert course.tasks == ("0", "1", "2")
    assert course.steps.tolist() == [0, 1, 2]
    assert course.losses.isfinite().all()
    record = recorder.steps[-1].record
    if record.weights is not None:
        assert_same([course.weights[-1]], [record.weights])
    assert course.seconds[1:].gt(0).all()
    assert recorder.report().startswith(f"{type(optimizer.rule).__name__}: 3 steps taken.")
    recorder.to_csv(tmp_path / "steps.csv")
    recorder.to_jsonl(tmp_path / "steps.jsonl")
    rows = table(tmp_path / "steps.csv")
    assert [float(row["gradbal/loss/1"]) for row in rows] == course.losses[:, 1].tolist()
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 3


def test_tasks_may_be_absent_and_new_ones_may_come() -> None:
    model = Toy(4)
    optimizer = wrapped(model, "mgda")
    recorder = Recorder(optimizer)
    for names in ("abc", "ac", "bd", "b"):
        losses = model.named()
        optimizer.step({name: losses[name] for name in names})
    course = recorder.course()
    assert course.tasks == ("a", "b", "c", "d")
    present = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 0, 0]]).bool()
    for numbers in (course.losses, course.weights, course.norms, course.slopes, course.along_sum):
        assert torch.equal(numbers.isfinite(), present)
    assert torch.equal(course.cosines.isfinite(), present[:, :, None] & present[:, None])
    assert_same([course.along_sum[3, 1], course.cosine_to_sum[3]], [torch.ones(())] * 2)


def test_tasks_that_meet_in_no_group_are_not_in_conflict() -> None:
    """Three tasks in a chain: the outer two share nothing."""
    p, q = param(3, seed=1), param(3, seed=2)
    optimizer = wrapped([p, q], "mgda", groups={"p": [p], "q": [q]})
    recorder = Recorder(optimizer)
    optimizer.step([square(p), square(p + q), square(q - 1)])
    course = recorder.course()
    assert len(recorder.steps[0].record.grams) == 2
    assert course.cosines[0, 0, 2] == 0
    assert course.weights.isfinite().all()


def test_update_every_has_weights_in_between_and_gradients_at_solves() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", update_every=3)
    recorder = Recorder(optimizer)
    train(optimizer, model, 7)
    course = recorder.course()
    assert course.weights.isfinite().all()
    assert course.norms.isfinite().all(dim=1).nonzero().flatten().tolist() == [0, 3, 6]
    assert " of 3 steps" in recorder.report()


def test_accumulated_pieces_are_one_step() -> None:
    model, whole = Toy(), Toy()
    optimizer, reference = wrapped(model, "upgrad"), wrapped(whole, "upgrad")
    recorders = [Recorder(optimizer), Recorder(reference)]
    for rows in (slice(0, 3), slice(3, 6)):
        pieces = [loss / 2 for loss in model.losses(rows=rows)]
        optimizer.backward(pieces, accumulate=rows.start == 0)
    optimizer.step()
    reference.step(whole.losses())
    ours, theirs = (recorder.course() for recorder in recorders)
    assert_same([ours.grams, ours.losses], [theirs.grams, theirs.losses])
    assert recorders[0].count == 1


def test_a_scaler_leaves_true_numbers_and_its_skips_are_counted() -> None:
    model, plain = Toy(), Toy()
    optimizer, reference, scale = wrapped(model), wrapped(plain), scaler(1024.0)
    recorder, other = Recorder(optimizer), Recorder(reference)
    for batch in range(4):
        if batch == 2:
            scaled_step(optimizer, spoiled(model, batch, "gradient"), scale)
        else:
            scaled_step(optimizer, model.named(batch), scale)
            reference.step(plain.named(batch))
    ours, theirs = recorder.course(), other.course()
    assert_same([ours.grams, ours.slopes], [theirs.grams, theirs.slopes], 1e-9)
    assert (recorder.count, recorder.skipped) == (3, 1)
    assert [kept.skipped for kept in recorder.steps] == [0, 0, 1]
    assert "3 steps taken, 1 left out because something was not finite." in recorder.report()


def test_steps_that_are_skipped_are_counted_and_not_kept() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", on_nonfinite="skip")
    optimizer.step(spoiled(model, 0, "nan"))
    recorder = Recorder(optimizer)
    for batch in range(3):
        optimizer.step(spoiled(model, batch, "nan") if batch == 1 else model.named(batch))
    assert (recorder.count, recorder.skipped) == (2, 1)
    assert recorder.course().losses.isfinite().all()


def test_a_step_without_losses_of_its_own_is_not_kept() -> None:
    model = Toy()
    optimizer = wrapped(model)
    optimizer.backward(model.losses())
    recorder = Recorder(optimizer)
    optimizer.step()
    assert recorder.count == 0  # its losses came before
    optimizer.backward(model.losses())
    optimizer.step()
    optimizer.step()
    assert recorder.count == 1
    recorder.detach()
    train(optimizer, model, 1)
    assert recorder.count == 1


def test_capturable_steps_stay_on_the_device_until_asked() -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, "upgrad", capturable=True), wrapped(plain, "upgrad")
    recorder, other = Recorder(optimizer), Recorder(reference)
    train(optimizer, model, 3)
    train(reference, plain, 3)
    ours, theirs = recorder.course(), other.course()
    assert_same([ours.grams, ours.weights], [theirs.grams, theirs.weights], 1e-6)


# ---------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("rule", ["upgrad", "ew", "graddrop"])
def test_recording_computes_and_copies_nothing(rule: str, capturable: bool) -> None:
    counts = []
    for recorded in (False, True):
        model = Toy()
        optimizer = wrapped(model, rule, engine="sequential", capturable=capturable)
        handle: Any = (
            Recorder(optimizer) if recorded else optimizer.register_step_post_hook(lambda *a: None)
        )
        train(optimizer, model, 2)
        losses = model.losses()
        with Dispatched() as dispatched:
            optimizer.step(losses)
        counts.append(dispatched.all)
        assert handle is not None
    assert counts[0] == counts[1]


def test_what_is_kept_is_small_and_holds_no_graph() -> None:
    model = Toy(3, width=200)
    optimizer = wrapped(model, "upgrad", groups="tensor")
    recorder = Recorder(optimizer)
    train(optimizer, model, 3)
    for kept in recorder.steps:
        record = kept.record
        assert record.weights is not None
        for tensor in (record.losses, record.weights, *record.grams.values()):
            assert tensor.grad_fn is None
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() < 1000


@pytest.mark.parametrize("capacity", [2, 7, 20])
@pytest.mark.parametrize("every", [1, 3])
def test_memory_is_bounded_and_the_whole_training_in_sight(capacity: int, every: int) -> None:
    history = History(capacity, every)
    record = StepRecord((), torch.empty(0))
    for number in range(0, 1000 * every, every):
        history.add(Step(number, 0.0, 0, record))
        kept = [one.number for one in history.steps()]
        assert len(kept) <= capacity
        assert kept == sorted(set(kept))
        newest = range(number, max(number - every * (capacity // 2), -1), -every)
        assert kept[-len(newest) :] == sorted(newest)
        sample = [one.number for one in history.sample]
        assert sample == [*range(0, number + 1, history.stride)]
        assert len(sample) > number // every // history.stride
    assert len(history.sample) >= capacity // 4


def test_every_keeps_one_step_in_so_many() -> None:
    model = Toy()
    optimizer = wrapped(model)
    recorder = Recorder(optimizer, every=3)
    train(optimizer, model, 8)
    assert [kept.number for kept in recorder.steps] == [0, 3, 6]
    assert recorder.count == 8
    assert "What follows is from 3 of them, evenly spread." in recorder.report()


# ---------------------------------------------------------------------- copies and checkpoints


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_of_the_optimizer_leave_the_recorder_behind(copied: Callable[[Any], Any]) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    recorder = Recorder(optimizer)
    train(optimizer, model, 2)
    twin_model, twin = copied((model, optimizer))
    train(twin, twin_model, 2, first=2)
    assert recorder.count == 2
    train(optimizer, model, 2, first=2)
    assert recorder.count == 4
    assert everything(twin_model, twin) == everything(model, optimizer)


def test_a_recording_goes_on_from_a_checkpoint() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", on_nonfinite="skip")
    recorder = Recorder(optimizer, capacity=6)
    optimizer.step(spoiled(model, 0, "nan"))
    train(optimizer, model, 9)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), recorder.state_dict()], file)
    file.seek(0)
    parts = torch.load(file, weights_only=True)
    again = Toy()
    other = wrapped(again, "upgrad", on_nonfinite="skip")
    resumed = Recorder(other, capacity=6)
    for one, part in zip((again, other, resumed), parts, strict=True):
        one.load_state_dict(part)
    for optimizer_, model_ in ((optimizer, model), (other, again)):
        optimizer_.step(spoiled(model_, 0, "nan"))
        train(optimizer_, model_, 5, first=9)
    assert (resumed.count, resumed.skipped) == (recorder.count, recorder.skipped) == (14, 2)
    for newest in (False, True):
        ours, theirs = resumed.course(newest=newest), recorder.course(newest=newest)
        assert ours.steps.tolist() == theirs.steps.tolist()
        for name in ("losses", "weights", "grams", "slopes", "squares", "residuals"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert [kept.number for kept in resumed.steps] == [kept.number for kept in recorder.steps]


# ---------------------------------------------------------------------- files


def test_metrics_of_several_groups_are_summed(tmp_path: Path) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, "mgda", groups="tensor"), wrapped(plain, "mgda")
    recorder, other = Recorder(optimizer), Recorder(reference)
    train(optimizer, model, 1)
    train(reference, plain, 1)
    rows = []
    for number, one in enumerate((recorder, other)):
        one.to_csv(tmp_path / f"{number}.csv")
        rows += table(tmp_path / f"{number}.csv")
    together, whole = rows
    names = [name for name in whole if "/norm/" in name or "/cos/" in name or "min" in name]
    assert len(names) == 7
    for name in names:
        assert float(together[name]) == pytest.approx(float(whole[name]), rel=1e-9)
    assert {*whole} - {*together} == {f"gradbal/weight/{task}" for task in range(3)}


def test_csv_has_a_column_for_all_that_ever_was(tmp_path: Path) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    recorder = Recorder(optimizer)
    optimizer.step({"a": model.losses()[0]})
    optimizer.step(dict(zip("ab", model.losses(), strict=False)))
    recorder.to_csv(tmp_path / "steps.csv")
    first, second = table(tmp_path / "steps.csv")
    assert first["gradbal/cos/a/b"] == ""
    assert -1 <= float(second["gradbal/cos/a/b"]) <= 1
    assert (first["step"], second["step"], second["skipped"]) == ("0", "1", "0")


def test_jsonl_has_everything_and_no_nan(tmp_path: Path) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", groups="tensor")
    recorder = Recorder(optimizer)
    train(optimizer, model, 2)
    recorder.to_jsonl(tmp_path / "steps.jsonl")
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines)
    assert first["seconds"] is None
    assert second["seconds"] > 0
    record = recorder.steps[1].record
    assert second["record"]["grams"] == {n: g.tolist() for n, g in record.grams.items()}
    assert record.weights is not None
    assert second["record"]["weights"] == record.weights.tolist()
    assert second["record"]["stats"] == record.stats


def test_tensorboard_gets_what_metrics_has() -> None:
    written: dict[tuple[str, int], float] = {}

    class Writer:
        def add_scalar(self, name: str, value: Tensor, number: int) -> None:
            assert value.ndim == 0
            written[name, number] = float(value)

    model = Toy()
    optimizer = wrapped(model, "upgrad")
    recorder = Recorder(optimizer)
    train(optimizer, model, 3)
    recorder.to_tensorboard(Writer())
    metrics = optimizer.metrics()
    del metrics["gradbal/skipped"]
    assert {n: v for (n, number), v in written.items() if number == 2 and "_to_sum" not in n} == {
        name: float(value) for name, value in metrics.items()
    }
    assert written["gradbal/cos_to_sum", 2] == float(recorder.course().cosine_to_sum[2])


# ---------------------------------------------------------------------- arguments


def test_arguments_are_checked() -> None:
    model = Toy()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    says(
        TypeError,
        f"Recorder: `mtl_opt` must be an MTLOptimizer, got {base!r}.",
        lambda: Recorder(base),  # type: ignore[arg-type]
    )
    optimizer = MTLOptimizer(base)
    says(
        ValueError,
        "Recorder: `capacity` must be >= 2, got 1.",
        lambda: Recorder(optimizer, capacity=1),
    )
    says(ValueError, "Recorder: `every` must be >= 1, got 0.", lambda: Recorder(optimizer, every=0))
    says(
        TypeError,
        "Recorder: `every` must be an int, got 0.5.",
        lambda: Recorder(optimizer, every=0.5),  # type: ignore[arg-type]
    )
    with pytest.raises(AttributeError, match=r"^module 'gradbal' has no attribute 'Recorded'$"):
        gradbal.Recorded  # type: ignore[attr-defined]  # noqa: B018
    assert not optimizer._optimizer_step_post_hooks
