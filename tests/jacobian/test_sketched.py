"""Sketched inner products: right on average, and nothing else changed."""

import importlib
from typing import Any

import pytest
import torch
from models import Deep, Inverse, assert_same, data, grads, lone_rows, wrapped
from torch import Tensor
from torch.nn import functional as F

from gradbal import engines
from gradbal._utils.torch_private import missing
from gradbal.jacobian.layers import Convolution, Sketch

FINDER: Any = importlib.import_module("gradbal.jacobian.factored")  # the package's is the function

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(autouse=True)
def whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sketch small layers, too."""
    monkeypatch.setattr(FINDER, "worthwhile", lambda uses, n_tasks, size=None: True)


def test_signs_keep_lengths() -> None:
    """The diagonal of S S' is 1, for S does not change what a single entry is worth."""
    matrix = Sketch(7, seed=3).matrix(50, torch.zeros(0).double())
    assert_same([(matrix @ matrix.T).diagonal()], [torch.ones(50).double()], 1e-12)
    again, other = Sketch(7, seed=3), Sketch(7, seed=4)
    assert torch.equal(again.matrix(50, matrix), matrix)
    assert not torch.equal(other.matrix(50, matrix), matrix)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", [(1, 0, 1), (2, 1, 1), (1, 2, 2), (2, 1, 2)], ids=str)
def test_projected_windows(
    ndim: int, groups: int, transposed: bool, options: tuple[int, int, int]
) -> None:
    """A convolution with random kernels is what windows times a random matrix is."""
    stride, padding, dilation = ([option] * ndim for option in options)
    image = data(3, 4, *(7, 6, 5)[:ndim], seed=1)
    shape = torch.Size([4, 6, *(2,) * ndim] if transposed else [6, 4 // groups, *(2,) * ndim])
    use = Convolution(image, shape, stride, padding, dilation, groups, transposed)
    matrix = data(use.sizes.b, 5, seed=2)
    assert_same([use.projected(matrix)], [use.inputs() @ matrix], 1e-12)


def gram(model: Deep, engine: engines.Engine, seed: int) -> Tensor:
    optimizer = wrapped(model, Inverse(), engine=engine, heads="plain", seed=seed)
    optimizer.backward(model.losses())
    assert optimizer.last is not None
    return optimizer.last.grams["model"]


def test_right_on_average() -> None:
    """The mean over seeds is the exact Gram matrix, within what its spread allows."""
    model = Deep(2, n_tasks=3, batch=9)
    exact = gram(model, engines.Sequential(), 0)
    found = torch.stack([gram(model, engines.Sketched(size=2), seed) for seed in range(300)])
    error = (found.mean(dim=0) - exact).abs() / (found.std(dim=0) / 300**0.5)
    assert error.max() < 4
    assert (found.std(dim=0) > 0).all()


def test_more_columns_less_noise() -> None:
    model = Deep(2, n_tasks=3, batch=40)
    exact = gram(model, engines.Sequential(), 0)
    noise = [
        torch.stack([gram(model, engines.Sketched(size=size), seed) - exact for seed in range(20)])
        .square()
        .mean()
        for size in (2, 8, 32)
    ]
    assert noise[0] > 2 * noise[1] > 4 * noise[2]


def test_as_many_columns_as_rows_is_exact() -> None:
    model = Deep(2, n_tasks=3, batch=9)
    exact = gram(model, engines.Sequential(), 0)
    assert_same([gram(model, engines.Sketched(size=9), 0)], [exact], 1e-10)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_the_direction_is_a_combination_of_the_task_gradients(chunk_size: int | None) -> None:
    model = Deep(2, n_tasks=3, batch=9)
    engine = engines.Sketched(chunk_size=chunk_size, size=2)
    optimizer = wrapped(model, "mgda", engine=engine, scale="native")
    optimizer.backward(model.losses())
    assert optimizer.last is not None
    rows = lone_rows(model.losses(), list(model.parameters()))
    for i, parameter in enumerate(model.layers.parameters()):
        wanted = sum(w * row[i] for w, row in zip(optimizer.last.weights, rows, strict=True))
        assert_same([parameter.grad], [wanted], 1e-10)
    assert max(optimizer.check(model.losses()).values()) < 1e-10


def test_draws_are_new_in_every_step_and_the_same_after_resuming() -> None:
    found, engine = [], engines.Sketched(size=2)
    for stop in (-1, 3):
        model = Deep(2, n_tasks=3, batch=9)
        optimizer, grams = wrapped(model, "mgda", engine=engine, lr=0.0, seed=5), []
        for step in range(5):
            if step == stop:
                state = optimizer.state_dict()
                optimizer = wrapped(model, "mgda", engine=engine, lr=0.0, seed=0)
                optimizer.load_state_dict(state)
            optimizer.step(model.losses())
            assert optimizer.last is not None
            grams.append(optimizer.last.grams["model"])
        found.append((grams, grads(model)))
    assert_same(*(grams for grams, _ in found), 0)
    assert_same(*(ours for _, ours in found), 0)
    assert not torch.equal(found[0][0][0], found[0][0][1])


def test_lookups_are_exact() -> None:
    """A table's task gradients have few rows, which meet as they are."""
    table, words = data(9, 4, seed=1).requires_grad_(), torch.tensor([1, 5, 5, 7])

    def losses() -> list[Tensor]:
        z = F.embedding(words, table)
        return [(z - k).square().mean() for k in range(3)]

    found = []
    for engine in (engines.Sketched(size=1), engines.Sequential()):
        optimizer = wrapped([table], Inverse(), engine=engine)
        optimizer.backward(losses())
        assert optimizer.last is not None
        found.append(optimizer.last.grams.values())
        table.grad = None
    assert_same(*found, 1e-10)


def test_what_cannot_be() -> None:
    model = Deep(1)
    with pytest.raises(ValueError, match="`size` must be >= 1"):
        engines.Sketched(size=0)
    with pytest.raises(ValueError, match="draws anew in each step"):
        wrapped(model, "mgda", engine="sketched", capturable=True)
    assert isinstance(engines.make_engine("sketched"), engines.Sketched)
