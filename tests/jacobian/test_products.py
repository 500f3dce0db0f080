"""Gradients that are not formed: their inner products, and when they are worth it."""

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import assert_same, data
from torch import Tensor

from gradbal.jacobian.dense import Keep
from gradbal.jacobian.layers import Layer, Lookup, Matmul, Use
from gradbal.jacobian.pull import Rows
from gradbal.jacobian.unformed import Product, product_gram

FINDER: Any = importlib.import_module("gradbal.jacobian.factored")  # the package's is the function


def products(use: Use, cotangents: Sequence[Tensor | None]) -> list[Product | None]:
    layer = Layer(torch.zeros(1), (), [use])
    return [None if c is None else Product(layer, [c]) for c in cotangents]


def by_hand(x: Tensor, cotangents: Sequence[Tensor | None]) -> Tensor:
    shape = (next(c for c in cotangents if c is not None).shape[1], x.shape[1])
    rows = [
        torch.zeros(shape).double() if c is None else c.double().T @ x.double() for c in cotangents
    ]
    flat = torch.stack(rows).flatten(1)
    return flat @ flat.T


def linear(x: Tensor, width: int) -> Matmul:
    return Matmul(x, False, (0, 1), torch.Size([width, x.shape[1]]))


HARD = {
    "rows that depend on each other": data(4, 9, seed=1)[[0, 1, 1, 2, 3, 3, 3]],
    "more rows than inputs": data(7, 2, seed=2),
    "rows that are zero": data(7, 9, seed=3) * torch.tensor([1, 0, 1, 0, 0, 1, 1])[:, None],
    "all rows zero": torch.zeros(7, 9).double(),
    "rows six decades apart": data(7, 9, seed=4) * torch.logspace(-6, 0, 7).double()[:, None],
    "almost the same row": 1 + data(7, 9, seed=5) * 1e-3,
}


@pytest.mark.parametrize("x", HARD.values(), ids=HARD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("scaled", [False, True])
def test_gram_of_hard_inputs(x: Tensor, dtype: torch.dtype, scale: float, scaled: bool) -> None:
    """As exact as if formed, also where samples cancel; to the square of that in float64."""
    centred = data(7, 3, seed=12)
    centred = (centred - centred.mean(dim=0)) * 1e-3
    cotangents = [data(7, 3, seed=10), data(7, 3, seed=11), centred, None]
    x = (x * scale**0.5).to(dtype)
    given = [None if c is None else (c * scale**0.5).to(dtype) for c in cotangents]
    gram = product_gram(products(linear(x, 3), given), scaled=scaled)
    wanted = by_hand(x, given)
    whole = torch.stack([x.new_zeros(()) if c is None else c.norm() for c in given]) * x.norm()
    whole, norms = whole.double(), wanted.diagonal().sqrt()  # without and with cancellation
    error = 1e-6 * whole
    allowed = torch.outer(norms, error) + torch.outer(error, norms) + torch.outer(error, error)
    if dtype == torch.float64:
        allowed = 1e-14 * torch.outer(whole, whole)
    assert ((gram - wanted).abs() <= allowed).all()
    assert not gram[3].any()
    assert gram.dtype == torch.float64


def test_a_task_that_is_not_finite_spoils_no_other() -> None:
    x = data(4, 9).float()
    good, bad = data(4, 3, seed=1).float(), data(4, 3, seed=2).float()
    bad[0, 0] = torch.nan
    gram = product_gram(products(linear(x, 3), [good, bad]))
    assert_same([gram[:1, :1]], [by_hand(x, [good])], 1e-6)
    assert gram[1].isnan().all()
    x[0, 0] = torch.inf
    assert product_gram(products(linear(x, 3), [good, good])).isnan().all()


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_graphs_of_two_batches_meet(dtype: torch.dtype, tol: float) -> None:
    """Rows of one column may come from different graphs, with different inputs."""
    xs = [data(4, 9, seed=1, dtype=dtype), data(2, 9, seed=2, dtype=dtype)]
    gs = [data(4, 3, seed=3, dtype=dtype), data(2, 3, seed=4, dtype=dtype)]
    rows = [row for x, g in zip(xs, gs, strict=True) for row in products(linear(x, 3), [g])]
    flat = torch.stack([(g.T @ x).flatten() for x, g in zip(xs, gs, strict=True)]).double()
    assert_same([product_gram(rows)], [flat @ flat.T], tol)


@pytest.mark.parametrize("what", ["tensor", "transposed", "nothing"])
def test_a_column_of_unlike_rows(what: str) -> None:
    """Beside a tensor, or a product of another form, products are formed."""
    x, g = data(4, 3, seed=1), data(4, 3, seed=2)
    weight = torch.zeros(3, 3).double()
    row = g.T @ x
    others = {
        "tensor": row.T,
        "transposed": Product(Layer(weight, (), [Matmul(x, False, (1, 0), weight.shape)]), [g]),
        "nothing": None,
    }
    keep = Keep()
    keep.open([weight], {0: "model"}, {0}, n_rows=2, n_tasks=2)
    keep.take([0], Rows(0, [Product(Layer(weight, (), [linear(x, 3)]), [g])]))
    keep.take([0], Rows(1, [others[what]]))
    keep.close()
    rows = torch.stack([row.flatten(), row.T.flatten() * (what != "nothing")])
    assert_same([keep.gram("model")], [rows @ rows.T], 1e-13)
    assert_same([keep.stacks("model")[0]], [rows.view(2, 3, 3)], 1e-13)


# ---------------------------------------------------------------------- the count


@pytest.mark.parametrize(
    ("shape", "rows", "n_tasks", "wanted"),
    [
        ((1024, 1024), 128, 2, True),
        ((1024, 1024), 128, 8, True),
        ((1024, 1024), 1024, 8, False),  # many rows
        ((1024, 1024), 128, 1, False),  # nothing to save
        ((4096, 1024), 256, 8, True),
        ((4096, 1024), 512, 8, False),  # products of so many rows, in float64, cost more
        ((256, 256), 128, 2, False),
        ((32, 32), 4, 8, False),  # too small to be worth a call
    ],
)
def test_products_where_they_cost_less(
    shape: tuple[int, int], rows: int, n_tasks: int, wanted: bool
) -> None:
    a, b = shape
    use = Matmul(torch.zeros(rows, b), False, (0, 1), torch.Size(shape))
    assert use.sizes == (1, rows, a, b)
    assert FINDER.worthwhile([use], n_tasks) == wanted
    if wanted:
        assert not FINDER._never(a * b, n_tasks)
        assert not FINDER.worthwhile([use] * 20, n_tasks)  # twenty uses have more rows


def test_tables_where_few_rows_are_looked_up() -> None:
    words = torch.zeros(100, dtype=torch.int64)
    for n_words, wanted in {1000: True, 120: False}.items():
        use = Lookup(words, -1, torch.Size([n_words, 8]))
        assert FINDER.worthwhile([use], 3) == wanted
