"""``accumulate=True``: surgery on the whole batch, piece by piece."""

import re
from typing import Any

import pytest
import torch
from cases import ONE_BATCH
from models import (
    Toy,
    assert_same,
    everything,
    expected_grads,
    frozen_copy,
    grads,
    param,
    square,
    sum_or_none,
    wrapped,
)
from torch import Tensor, nn

from gradbal import MTLOptimizer, engines

PIECES = [slice(0, 2), slice(2, 4), slice(4, 6)]
ENGINES = ["sequential", "batched", engines.Batched(chunk_size=2)]


def pieces(model: Toy, batch: int = 0) -> list[list[Tensor]]:
    return [[loss / 3 for loss in model.losses(batch, rows)] for rows in PIECES]


def window(optimizer: MTLOptimizer, model: Toy, batch: int = 0, **options: Any) -> None:
    *some, last = pieces(model, batch)
    for losses in some:
        optimizer.backward(losses, accumulate=True, **options)
    optimizer.backward(last, **options)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("rule", ONE_BATCH)
def test_pieces_equal_the_large_batch(rule: str, engine: Any) -> None:
    whole, parts = Toy(), Toy()
    first, second = wrapped(whole, rule, engine=engine), wrapped(parts, rule, engine=engine)
    for batch in range(3):
        first.step(whole.losses(batch))
        second.zero_grad()
        window(second, parts, batch)
        assert_same(grads(parts), grads(whole), 1e-8)
        second.step()
        assert_same(parts.parameters(), whole.parameters(), 1e-8)
    ours, theirs = (o.core.contents()["state"] for o in (first, second))
    assert_same(leaves(ours), leaves(theirs), 1e-8)


@pytest.mark.parametrize("rule", ["ew", "mgda", "upgrad", "imtl_g"])
def test_directions_of_pieces_add_up_to_something_else(rule: str) -> None:
    """Without ``accumulate`` the rule sees every piece by itself, and ``.grad`` adds up."""
    whole, parts = Toy(), Toy()
    params = list(parts.parameters())
    wanted = [expected_grads(losses, params, rule) for losses in pieces(parts)]
    total = [sum_or_none(column) for column in zip(*wanted, strict=True)]
    optimizer = wrapped(parts, rule)
    for losses in pieces(parts):
        optimizer.backward(losses)
    assert_same(grads(parts), total, 1e-10)
    wrapped(whole, rule).backward(whole.losses())
    apart = max(
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(grads(parts), grads(whole), strict=True)
        if a is not None and b is not None
    )
    assert (apart < 1e-10) == (rule == "ew")


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    return [tree] if isinstance(tree, Tensor) else []


@pytest.mark.parametrize(
    "options", [{"heads": "weighted"}, {"heads": "plain"}, {"groups": "tensor", "heads": "plain"}]
)
def test_with_heads_and_groups(options: dict[str, str]) -> None:
    whole, parts = Toy(), Toy()
    first, second = wrapped(whole, "mgda", **options), wrapped(parts, "mgda", **options)
    first.backward(whole.losses())
    window(second, parts)
    assert_same(grads(parts), grads(whole), 1e-9)


def test_nothing_is_written_before_the_last_piece() -> None:
    model = Toy()
    optimizer = wrapped(model, "uw")
    before = [p.detach().clone() for p in model.parameters()]
    for losses in pieces(model)[:2]:
        optimizer.backward(losses, accumulate=True)
    assert grads(model) == [None] * 10
    assert_same(model.parameters(), before, 0)
    assert optimizer.core.contents()["step"]["solved"] == 0
    assert optimizer.last is None


def test_step_resolves_what_is_pending() -> None:
    whole, parts = Toy(), Toy()
    wrapped(whole, "upgrad").step(whole.losses())
    optimizer = wrapped(parts, "upgrad")
    *some, last = pieces(parts)
    for losses in some:
        optimizer.backward(losses, accumulate=True)
    optimizer.step(last)
    assert_same(parts.parameters(), whole.parameters(), 1e-10)
    assert not optimizer.core.contents()["pending"]["rows"]


def test_pending_gradients_survive_zero_grad_and_are_dropped_by_discard() -> None:
    whole, parts = Toy(), Toy()
    wrapped(whole, "upgrad").backward(whole.losses())
    optimizer = wrapped(parts, "upgrad")
    *some, last = pieces(parts)
    optimizer.backward(parts.losses(5), accumulate=True)
    optimizer.discard()
    assert not optimizer.core.contents()["pending"]["rows"]
    for losses in some:
        optimizer.backward(losses, accumulate=True)
        optimizer.zero_grad()
    optimizer.backward(last)
    assert_same(grads(parts), grads(whole), 1e-10)


def test_different_tasks_in_different_pieces() -> None:
    """Rows add up per task, whoever was present when; the tasks of any piece take part."""
    model, reference = Toy(), Toy()
    optimizer = wrapped(model, "upgrad")
    a, b, c = (model.named(k) for k in range(3))
    optimizer.backward({"a": a["a"], "b": a["b"]}, accumulate=True)
    optimizer.backward({"c": b["c"]}, accumulate=True)
    optimizer.backward({"a": c["a"], "c": c["c"]})
    assert optimizer.last is not None
    assert optimizer.last.tasks == ("a", "b", "c")
    a, b, c = (reference.named(k) for k in range(3))
    second = wrapped(reference, "upgrad")
    second.backward({"a": a["a"] + c["a"], "b": a["b"], "c": b["c"] + c["c"]})
    assert_same(grads(model), grads(reference), 1e-10)
    assert_same([optimizer.last.losses], [second.last.losses], 1e-12)  # type: ignore[union-attr]


def test_a_single_task_per_piece() -> None:
    """Sharing that no single piece shows is found when all are there."""
    for rule in ("mgda", "nash_mtl", "graddrop", "uw"):
        model, reference = Toy(), Toy()
        optimizer, second = wrapped(model, rule), wrapped(reference, rule)
        for name, last in (("a", False), ("b", False), ("c", True)):
            optimizer.backward({name: model.named()[name]}, accumulate=not last)
        second.backward(reference.named())
        assert_same(grads(model), grads(reference), 1e-9)


def test_new_tasks_in_a_later_piece() -> None:
    model = Toy()
    optimizer = wrapped(model, "gradvac")
    optimizer.backward({"a": model.named()["a"]}, accumulate=True)
    optimizer.backward(model.named(1))
    assert optimizer.core.contents()["tasks"]["names"] == ["a", "b", "c"]


def test_backward_adds_the_resolved_sum_to_what_is_there() -> None:
    whole, parts = Toy(), Toy()
    wrapped(whole, "mgda").backward(whole.losses())
    for parameter in parts.parameters():
        parameter.grad = torch.ones_like(parameter)
    window(wrapped(parts, "mgda"), parts)
    assert_same(grads(parts), [g + 1 for g in grads(whole) if g is not None], 1e-9)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_partly_shared_parameters_keep_their_tasks(engine: str) -> None:
    stem, left, right = (param(4, 4, seed=i) for i in range(3))
    x = torch.linspace(-1, 1, 24).double().reshape(6, 4)

    def losses() -> list[Tensor]:
        z = (x @ stem).tanh()
        a, b = (z @ left).tanh(), (z @ right).tanh()
        return [square(a - 1), square(a + b), square(b + 1)]

    optimizer = wrapped([stem, left, right], "mgda", groups="tensor", engine=engine)
    optimizer.backward(losses())
    once = grads([stem, left, right])
    optimizer.zero_grad()
    for last in (False, True):
        optimizer.backward([loss / 2 for loss in losses()], accumulate=not last)
    assert_same(grads([stem, left, right]), once, 1e-9)


def test_sparse_gradients_add_up() -> None:
    def run(split: bool) -> Tensor | None:
        table = nn.Embedding(9, 4, sparse=True).double()
        nn.init.constant_(table.weight, 0.3)
        optimizer = MTLOptimizer(torch.optim.SparseAdam(list(table.parameters())), "mgda")
        words = torch.tensor([1, 5, 5, 2])

        def losses(rows: slice) -> list[Tensor]:
            z = table(words[rows])
            return [z.square().sum(), (z - 1).square().sum() + z[:, 0].sum()]

        if split:
            optimizer.backward(losses(slice(0, 2)), accumulate=True)
            optimizer.backward(losses(slice(2, 4)))
        else:
            optimizer.backward(losses(slice(0, 4)))
        assert table.weight.grad is not None
        assert table.weight.grad.is_sparse
        return table.weight.grad

    assert_same([run(True)], [run(False)], 1e-12)


@pytest.mark.parametrize("rule", ["uw", "upgrad", "nash_mtl", "graddrop"])
def test_auxiliary_losses_add_up(rule: str) -> None:
    whole, parts = Toy(), Toy()
    wrapped(whole, rule).backward(whole.losses(), aux=whole.heads[0].weight.square().sum())
    optimizer = wrapped(parts, rule)
    for k, losses in enumerate(pieces(parts)):
        aux = parts.heads[0].weight.square().sum() / 3
        optimizer.backward(losses, aux=aux, accumulate=k < 2)
    assert_same(grads(parts), grads(whole), 1e-9)


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("rule", ["uw", "upgrad", "graddrop", "famo"])
def test_a_raising_call_leaves_everything_as_it_was(rule: str, accumulate: bool) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    optimizer.step(model.losses())
    optimizer.zero_grad()
    optimizer.backward(pieces(model)[0], accumulate=True)
    before = everything(model, optimizer)
    freed = model.losses(1)
    torch.autograd.grad(freed[1], list(model.trunk.parameters()))
    with pytest.raises(RuntimeError, match="is used up"):
        optimizer.backward(freed, accumulate=accumulate)
    assert everything(model, optimizer) == before
    with pytest.raises(ValueError, match=re.escape("expected one loss for each of the 3 tasks")):
        optimizer.backward(model.losses(1)[:2], accumulate=accumulate)
    assert everything(model, optimizer) == before
    with pytest.raises(TypeError, match="has no graph"):
        optimizer.backward([1.0, *model.losses(1)[:2]], accumulate=accumulate)  # type: ignore[list-item]
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("rule", ["uw", "upgrad", "graddrop"])
def test_a_piece_that_is_not_finite_spoils_the_window(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, on_nonfinite="skip")
    optimizer.step(model.losses(7))
    params = frozen_copy(dict(model.state_dict()))
    solved = frozen_copy(optimizer.core.contents()["state"])
    first, second, third = pieces(model)
    first[1] = first[1] * float("nan")
    optimizer.backward(first, accumulate=True)
    optimizer.backward(second, accumulate=True)
    optimizer.backward(third)
    assert grads(model) == [None] * 10
    optimizer.step()
    assert frozen_copy(dict(model.state_dict())) == params
    assert frozen_copy(optimizer.core.contents()["state"]) == solved
    assert optimizer.core.skipped == 1
    good = Toy()
    good.load_state_dict(model.state_dict())
    window(optimizer, model)
    wrapped(good, rule if rule != "uw" else "ew").backward(good.losses())
    if rule == "upgrad":
        assert_same(grads(model), grads(good), 1e-9)
    assert all(g is not None and g.isfinite().all() for g in grads(model))


def test_a_spoiled_window_that_raises_can_be_discarded() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    first, _, third = pieces(model)
    optimizer.backward([first[0] * float("inf"), *first[1:]], accumulate=True)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="of task '0' is not finite"):
        optimizer.backward(third)
    assert everything(model, optimizer) == before
    optimizer.discard()
    optimizer.backward(pieces(model)[2])
    assert all(g is not None and g.isfinite().all() for g in grads(model))


def test_representations_of_different_batches_cannot_be_accumulated() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine="representation")
    with pytest.raises(
        RuntimeError,
        match=re.escape(
            "Representation: its rows belong to the inputs of one batch, so they cannot be "
            "accumulated; use Sequential or Batched."
        ),
    ):
        optimizer.backward(model.losses(), accumulate=True)


class Ignoring(torch.autograd.Function):
    """Takes a parameter and has no gradient for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


@pytest.mark.parametrize("rule", ["upgrad", "mgda"])
def test_pieces_count_the_tasks_that_the_graph_shows(rule: str) -> None:
    """One that reaches a shared parameter without a gradient for it is a member in both ways."""
    found = []
    for pieces in (1, 2):
        model, shared = Toy(3), nn.Parameter(torch.ones(5).double())
        optimizer = wrapped([*model.parameters(), shared], rule)
        for piece in range(pieces):
            rows = slice(piece * 6 // pieces, (piece + 1) * 6 // pieces)
            first, second, _ = (loss / pieces for loss in model.losses(rows=rows))
            apart = Ignoring.apply((shared.detach() * 0 + 2).requires_grad_(), shared)
            losses = [first + shared.sum() / pieces, second, apart.sum() / pieces]
            optimizer.backward(losses, accumulate=piece < pieces - 1)
        found.append([param.grad for param in (*model.parameters(), shared)])
    assert_same(found[1], found[0], 1e-12)
