"""Metrics and losses: exact over batches, right by definition, blind for missing labels."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor
from torch.nn import functional as F

from gradbal import MTLOptimizer
from gradbal.lab.problems import losses
from gradbal.lab.problems.losses import Loss
from gradbal.lab.problems.metrics import (
    AUC,
    F1,
    Accuracy,
    Depth,
    Errors,
    Metric,
    Normals,
    RelativeError,
    Segmentation,
)

CLASSES, N, SIDE = 5, 40, 3
Made = tuple[Tensor, Tensor]


def numbers(draw: torch.Generator, outputs: tuple[int, ...], targets: tuple[int, ...]) -> Made:
    """Return outputs, and targets above 0 of which a quarter is missing."""
    y = 0.1 + torch.rand(targets, generator=draw)
    missing = torch.rand(y.shape, generator=draw) < 0.25
    return torch.randn(outputs, generator=draw), y.masked_fill(missing, torch.nan)


def answers(draw: torch.Generator, outputs: tuple[int, ...], targets: tuple[int, ...]) -> Made:
    x, y = numbers(draw, outputs, targets)
    return (4 * x).round() / 4, y.where(y.isnan(), (y > 0.6).float())  # with ties


def classes(draw: torch.Generator, outputs: tuple[int, ...], targets: tuple[int, ...]) -> Made:
    x = torch.randn(outputs, generator=draw)
    return x, torch.randint(-1, CLASSES, targets, generator=draw)


ROWS, DEPTHS = ((N, 1), (N,)), ((N, 1, SIDE, SIDE), (N, SIDE, SIDE))
VECTORS = ((N, 3, SIDE, SIDE), (N, 3, SIDE, SIDE))
METRICS: dict[
    str, tuple[Callable[[], Metric], Callable[..., Made], tuple[tuple[int, ...], ...]]
] = {
    "accuracy": (Accuracy, classes, ((N, CLASSES), (N,))),
    "segmentation": (
        partial(Segmentation, CLASSES),
        classes,
        ((N, CLASSES, SIDE, SIDE), (N, SIDE, SIDE)),
    ),
    "depth": (Depth, numbers, DEPTHS),
    "normals": (Normals, numbers, VECTORS),
    "errors": (partial(Errors, 2.5), numbers, ROWS),
    "relative": (RelativeError, numbers, ROWS),
    "f1": (F1, answers, ROWS),
    "auc": (AUC, answers, ROWS),
}
LOSSES: dict[str, tuple[Loss, Callable[..., Made], tuple[tuple[int, ...], ...]]] = {
    "cross_entropy": (losses.cross_entropy, classes, METRICS["segmentation"][2]),
    "binary_cross_entropy": (losses.binary_cross_entropy, answers, ROWS),
    "squared_error": (losses.squared_error, numbers, ROWS),
    "absolute_error": (losses.absolute_error, numbers, DEPTHS),
    "cosine": (losses.cosine, numbers, VECTORS),
}


def made(name: str, seed: int = 0) -> Made:
    _, make, shapes = METRICS[name]
    return make(torch.Generator().manual_seed(seed), *shapes)


def figures(name: str, *batches: Made) -> dict[str, float]:
    metric = METRICS[name][0]()
    for outputs, targets in batches:
        metric.update(outputs, targets)
    return metric.compute()


# ---------------------------------------------------------------------- laws of all metrics


@pytest.mark.parametrize("name", METRICS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, N), max_size=4))
def test_the_figures_of_batches_are_those_of_all_examples(
    name: str, seed: int, cuts: list[int]
) -> None:
    outputs, targets = made(name, seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    parts = (tensor[order].tensor_split(sorted(cuts)) for tensor in (outputs, targets))
    together, apart = figures(name, (outputs, targets)), figures(name, *zip(*parts, strict=True))
    assert apart == pytest.approx(together, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("name", METRICS)
def test_missing_labels_count_for_nothing(name: str) -> None:
    outputs, targets = made(name)
    known = targets >= 0
    changed = outputs.clone()
    if known.ndim == outputs.ndim:
        known = known.all(dim=1)
    changed.movedim(1, -1)[~known] += 100
    assert not torch.equal(changed, outputs)
    assert figures(name, (changed, targets)) == figures(name, (outputs, targets))


@pytest.mark.parametrize("name", METRICS)
def test_without_labels_nothing_is_known(name: str) -> None:
    higher = METRICS[name][0]().higher
    assert figures(name).keys() == higher.keys()
    assert all(map(math.isnan, figures(name).values()))
    outputs, targets = made(name)
    nothing = targets.new_full(targets.shape, torch.nan if targets.is_floating_point() else -1)
    assert all(map(math.isnan, figures(name, (outputs, nothing)).values()))


# ---------------------------------------------------------------------- what the figures are


def known(name: str) -> tuple[np.ndarray, np.ndarray]:
    outputs, targets = losses.labelled(*made(name))
    return outputs.double().numpy(), targets.numpy()


def test_classes_agree_with_scikit_learn() -> None:
    x, y = known("segmentation")
    wanted = {
        "miou": sk.jaccard_score(y, x.argmax(1), average="macro"),
        "pixel_accuracy": sk.accuracy_score(y, x.argmax(1)),
    }
    assert figures("segmentation", made("segmentation")) == pytest.approx(wanted)
    x, y = known("accuracy")
    wanted = {"accuracy": sk.accuracy_score(y, x.argmax(1))}
    assert figures("accuracy", made("accuracy")) == pytest.approx(wanted)


def test_answers_agree_with_scikit_learn() -> None:
    x, y = known("f1")
    assert len(set(x[:, 0])) < len(x)  # there are ties
    assert figures("f1", made("f1"))["f1"] == pytest.approx(sk.f1_score(y, x[:, 0] > 0))
    assert figures("auc", made("auc"))["auc"] == pytest.approx(sk.roc_auc_score(y, x[:, 0]))


def test_a_class_that_does_not_occur_is_left_out_of_the_mean() -> None:
    metric = Segmentation(9)
    metric.update(F.one_hot(torch.tensor([0, 0, 7]), 9).float(), torch.tensor([0, 7, 7]))
    assert metric.compute() == pytest.approx({"miou": 1 / 2, "pixel_accuracy": 2 / 3})


def test_numbers_agree_with_their_definitions() -> None:
    x, y = known("errors")
    error = 2.5 * (x[:, 0] - y)
    wanted = {"mae": np.abs(error).mean(), "rmse": np.sqrt((error**2).mean())}
    assert figures("errors", made("errors")) == pytest.approx(wanted)
    relative = np.sqrt(((x[:, 0] - y) ** 2).sum() / (y.astype(float) ** 2).sum())
    assert figures("relative", made("relative")) == pytest.approx({"rrmse": relative})
    x, y = known("depth")
    error = np.abs(x[:, 0] - y)
    wanted = {"abs_err": error.mean(), "rel_err": (error / y).mean()}
    assert figures("depth", made("depth")) == pytest.approx(wanted)


def test_angles_are_those_between_the_vectors_of_whatever_length() -> None:
    degrees = torch.tensor([0, 11, 12, 22, 23, 29, 31, 90, 180]).double()
    turned = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin(), 0 * degrees], dim=1)
    metric = Normals()
    metric.update(3 * turned, torch.tensor([[2.0, 0, 0]]).expand(9, 3))
    shares = {"within_11.25": 2 / 9, "within_22.5": 4 / 9, "within_30": 6 / 9}
    wanted = {"mean": degrees.mean().item(), "median": 23.0, **shares}
    assert metric.compute() == pytest.approx(wanted, abs=1e-4)


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("name", LOSSES)
def test_missing_labels_take_no_part_in_the_loss(name: str) -> None:
    loss, make, shapes = LOSSES[name]
    outputs, targets = make(torch.Generator().manual_seed(0), *shapes)
    outputs.requires_grad_()
    value = loss(outputs, targets)
    rows = [loss(x[None], y[None]) for x, y in zip(*losses.labelled(outputs, targets), strict=True)]
    torch.testing.assert_close(value, torch.stack(rows).mean())
    (gradient,) = torch.autograd.grad(value, outputs)
    present = targets >= 0
    present = present.all(dim=1) if present.ndim == outputs.ndim else present
    assert gradient.isfinite().all()
    assert not gradient.movedim(1, -1)[~present].any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_labels_makes_the_task_absent(name: str) -> None:
    loss, make, shapes = LOSSES[name]
    _, targets = make(torch.Generator().manual_seed(0), *shapes)
    nothing = targets.new_full(targets.shape, torch.nan if targets.is_floating_point() else -1)
    layer = torch.nn.Parameter(torch.ones(shapes[0][1:]))
    mtl_opt = MTLOptimizer(torch.optim.SGD([layer], lr=0.1), "pcgrad")
    outputs = layer.expand(shapes[0])
    mtl_opt.step({"here": outputs.square().sum(), "absent": loss(outputs, nothing)})
    assert mtl_opt.last.tasks == ("here",)
    torch.testing.assert_close(layer.grad, 2 * N * torch.ones_like(layer))


def test_losses_are_the_usual_ones() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 1, generator=draw), torch.rand(4, generator=draw).round()
    wanted = F.binary_cross_entropy(x[:, 0].sigmoid(), y)
    torch.testing.assert_close(losses.binary_cross_entropy(x, y), wanted)
    torch.testing.assert_close(losses.squared_error(x, y), (x[:, 0] - y).square().mean())
    torch.testing.assert_close(losses.absolute_error(x, y), (x[:, 0] - y).abs().mean())
    logits = torch.randn(4, 3, generator=draw)
    wanted = -logits.log_softmax(1)[torch.arange(4), y.long()].mean()
    torch.testing.assert_close(losses.cross_entropy(logits, y.long()), wanted)
    torch.testing.assert_close(losses.cosine(-logits, logits), torch.tensor(2.0))
