"""What a recorder says in words, on losses whose gradients are known."""

from typing import Any

import pytest
import torch
from models import Toy, param, wrapped

import gradbal
from gradbal import Recorder


def said(rows: list[list[float]], rule: Any = "upgrad", steps: int = 40, **options: Any) -> str:
    """Report on losses that are linear, so that the task gradients are always the same."""
    point = param(len(rows[0]))
    optimizer = wrapped([point], rule, **options)
    recorder = Recorder(optimizer)
    for _ in range(steps):
        optimizer.step({"abcdefgh"[i]: point @ point.new_tensor(r) for i, r in enumerate(rows)})
    return "\n".join(line for line in recorder.report().splitlines() if "Time from" not in line)


def test_words_on_a_conflict() -> None:
    assert said([[1, 0], [-3, 3]]) == (
        "UPGrad: 40 steps taken.\n"
        "Conflict: some cosine of two task gradients was negative in 40 of 40 steps (100%), 100% "
        "of all cosines.\n"
        "  a / b: negative in 40 of 40 steps (100%), median -0.71, lowest -0.71\n"
        "Lengths: b dominates; its gradient is 4.24 times as long as that of the next, a "
        "(medians), and was the longest in 40 of 40 steps (100%).\n"
        "Direction: its cosine with the plain sum is 0.745 (median; lowest 0.745), its length "
        "0.981 times that of the sum (median), which acts like a factor on the learning rate.\n"
        "To first order the plain sum raises the loss of some task in 40 of 40 steps (100%), most "
        "often a (40); the direction does so in 0 of 40 steps (0%).\n"
        "Weights: none has collapsed in the newest 40 steps.\n"
        "Solver: residual 0.0e+00 at most.\n"
        "Verdict: conflict: the plain sum raises some loss in 40 of 40 steps (100%). Whether the "
        "rule helps, only a comparison with tuned fixed weights can say."
    )


def test_words_where_there_is_no_conflict() -> None:
    words = said([[1, 0], [1, 1]])
    assert (
        "Conflict: no two task gradients had a negative cosine in 40 steps; the lowest was 0.71 "
        "(a / b).\n"
        "Lengths: no task dominates; medians from 1.41 (b) to 1 (a).\n"
        "Direction: its cosine with the plain sum is 1.000 (median; lowest 1.000), its length 1 "
        "times that of the sum (median)" in words
    )
    assert words.endswith(
        "Verdict: no conflict here: the plain sum is as good. It raises no loss, to first "
        "order, in 40 of 40 steps (100%)."
    )
    assert said([[1, 0], [5, 5]]).endswith(
        "What sets the tasks apart is length, and fixed weights on the losses balance that."
    )


def test_words_where_only_pairs_conflict() -> None:
    words = said([[1, 0], [-0.5, 1], [0.5, 1]])
    assert "13 of 40" not in words
    assert "negative in 40 of 40 steps (100%), 33% of all cosines." in words
    assert "b / c" not in words
    assert words.endswith(
        "Verdict: some gradients conflict, but not with the plain sum: it raises no loss, to "
        "first order, in 40 of 40 steps (100%). Compare with it before you pay for a rule."
    )


def test_orthogonal_gradients_do_not_conflict_by_rounding() -> None:
    assert "Verdict: no conflict here" in said([[1, 1e-9], [-1e-9, 1]])


def test_words_on_many_tasks_name_a_few() -> None:
    rows = torch.eye(5).double() - 0.3
    words = said(rows.tolist())
    assert words.count("negative in 40 of 40 steps") == 6
    assert "  others, less often: 5\n" in words


def test_words_on_few_steps() -> None:
    assert said([[1, 0], [1, 1]], steps=3).endswith(
        "Verdict: too few steps for one, 3 where 20 are the least."
    )
    assert said([[1, 0], [1, 1]], steps=0) == "UPGrad: 0 steps taken. Nothing is recorded."


def test_words_on_rules_that_see_no_gradients_or_have_no_weights() -> None:
    assert said([[1, 0], [-3, 3]], "ew") == (
        "EW: 40 steps taken.\n"
        "Conflict: unknown, since EW looks at the losses alone; `layer_conflicts(losses, model)` "
        "shows it for one batch.\n"
        "Weights: none has collapsed in the newest 40 steps."
    )
    words = said([[1, 0], [-3, 3]], "graddrop")
    assert (
        "Direction: no weighted sum of these gradients, so they do not tell how it compares."
        in words
    )
    assert "the plain sum raises the loss of some task in 40 of 40 steps (100%), most" in words
    assert "Weights" not in words
    assert "since no gradients of two tasks were compared;" in said([[1, 0]])


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"engine": gradbal.engines.Representation()}, "at the representation"),
        ({"engine": gradbal.engines.Sketched()}, "as sketches estimate them"),
        ({"gram_over": True}, "over the parameters in `gram_over`"),
        ({}, ""),
    ],
)
def test_words_on_what_is_compared(options: dict[str, Any], place: str) -> None:
    model = Toy()
    over = {"gram_over": model.trunk[2]} if "gram_over" in options else {}
    optimizer = wrapped(model, "mgda", **options | over)
    recorder = Recorder(optimizer)
    optimizer.step(model.losses())
    line = f"What follows is what the rule sees: inner products {place}."
    assert (line in recorder.report().splitlines()) is bool(place)


def test_words_on_weights_that_collapse() -> None:
    words = said([[100, 1], [0, 1], [100, 0]], gradbal.make_rule("mgda"))
    assert (
        "Weights: collapsed for a, c: at most 1% of the mean weight in more than half of the "
        "newest 40 steps." in words
    )
