"""``step`` sets ``.grad``, ``backward`` adds to it, as ``loss.backward()`` does."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import (
    PUBLISHED,
    Fixed,
    Toy,
    assert_same,
    data,
    expected_grads,
    fill,
    frozen_copy,
    grads,
    param,
    square,
    wrapped,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradbal import MTLOptimizer, engines

RULES = pytest.mark.parametrize("rule", ["ew", "uw", "upgrad", "nash_mtl", "graddrop"])


def added(a: list[Tensor | None], b: list[Tensor | None]) -> list[Tensor | None]:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


@RULES
def test_step_is_backward_and_base_step(rule: str) -> None:
    one, two = Toy(), Toy()
    first, second = wrapped(one, rule), wrapped(two, rule)
    for batch in range(4):
        first.step(one.losses(batch))
        second.zero_grad()
        second.backward(two.losses(batch))
        second.step()
        assert_same(one.parameters(), two.parameters(), 1e-13)
        assert_same(grads(one), grads(two), 1e-13)


@RULES
def test_step_sets_whatever_was_there_before(rule: str) -> None:
    model, fresh = Toy(), Toy()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    wrapped(model, rule).step(model.losses())
    wrapped(fresh, rule).step(fresh.losses())
    assert_same(grads(model), grads(fresh), 1e-14)


def test_step_clears_gradients_of_what_is_not_reached() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "mgda")
    optimizer.step(model.named())
    optimizer.step(dict(zip("ab", model.losses(1), strict=False)))
    assert all(p.grad is None for p in model.heads[2].parameters())


@RULES
def test_zero_grad_left_in_the_loop_is_harmless(rule: str) -> None:
    one, two = Toy(), Toy()
    first, second = wrapped(one, rule), wrapped(two, rule)
    for batch in range(3):
        first.step(one.losses(batch))
        second.zero_grad()
        losses = two.losses(batch)
        second.zero_grad(set_to_none=False)
        second.base.zero_grad()
        second.step(losses)
        second.zero_grad()
    assert_same(one.parameters(), two.parameters(), 0)


@RULES
def test_backward_adds_to_what_it_wrote_before(rule: str) -> None:
    model, chosen = Toy(), PUBLISHED.get(rule, rule)  # else it starts at its first losses
    singles = []
    for batch in range(3):
        alone = Toy()
        optimizer = wrapped(alone, chosen)
        optimizer.core.generator.manual_seed(batch)
        if rule != "graddrop":  # draws by the number of the step
            optimizer.backward(alone.losses(batch))
            singles.append(grads(alone))
    optimizer = wrapped(model, chosen)
    for batch in range(3):
        optimizer.core.generator.manual_seed(batch)
        before = grads(model)
        optimizer.backward(model.losses(batch))
        if singles:
            assert_same(grads(model), added(before, singles[batch]), 1e-13)


@RULES
@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
def test_backward_adds_into_foreign_gradients_in_place(rule: str, engine: str) -> None:
    model, alone = Toy(), Toy()
    wrapped(alone, rule, engine=engine).backward(alone.losses())
    foreign = [torch.full_like(p, 2.0) for p in model.parameters()]
    mixed = [f if i % 2 else None for i, f in enumerate(foreign)]
    for parameter, grad in zip(model.parameters(), mixed, strict=True):
        parameter.grad = grad
    wanted = added(grads(alone), [None if g is None else g.clone() for g in mixed])
    wrapped(model, rule, engine=engine).backward(model.losses())
    assert_same(grads(model), wanted, 1e-13)
    for parameter, grad in zip(model.parameters(), mixed, strict=True):
        if grad is not None:
            assert parameter.grad is grad


def test_backward_adds_into_views_of_one_flat_gradient() -> None:
    model, alone = Toy(), Toy()
    wrapped(alone, "upgrad").backward(alone.losses())
    flat = torch.ones(sum(p.numel() for p in model.parameters())).double()
    views = flat.split([p.numel() for p in model.parameters()])
    for parameter, view in zip(model.parameters(), views, strict=True):
        parameter.grad = view.view_as(parameter)
    optimizer = wrapped(model, "upgrad")
    optimizer.backward(model.losses())
    whole = torch.cat([g.reshape(-1) for g in grads(alone) if g is not None])
    assert_same([flat], [whole + 1], 1e-13)
    with torch.no_grad():
        flat.zero_()
    optimizer.backward(model.losses())
    assert_same([flat], [whole], 1e-13)


@pytest.mark.parametrize("engine", ["sequential", "batched", "streaming", "representation"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_a_gradient_that_somebody_holds_is_never_overwritten(rule: str, engine: str) -> None:
    """As in torch: an optimizer may keep ``p.grad`` by reference (optimistic gradients do)."""
    if rule == "graddrop" and engine == "streaming":
        engine = "factored"  # no engine without rows for a rule that works entry by entry
    model = Toy()
    optimizer = wrapped(model, rule, engine=engine)
    kept, copies = [], []
    for batch in range(3):
        optimizer.step(model.losses(batch))
        kept.append([p.grad for p in model.parameters()])
        copies.append(frozen_copy(grads(model)))
        optimizer.zero_grad()
    assert [frozen_copy(held) for held in kept] == copies


def test_a_gradient_that_a_hook_holds_is_not_the_one_in_grad() -> None:
    model, seen = Toy(), list[Tensor]()
    weight = model.heads[0].weight
    weight.register_hook(seen.append)
    optimizer = wrapped(model, "upgrad")
    optimizer.backward(model.losses())
    once = seen[0].clone()
    optimizer.backward(model.losses(1))
    assert_same([seen[0]], [once], 0)


@pytest.mark.parametrize("rule", ["ew", "uw", "famo", "upgrad"])
@pytest.mark.parametrize("as_task", [True, False])
def test_parameters_outside_the_optimizer_are_never_written(rule: str, as_task: bool) -> None:
    """Also if they enter the graph after a warm-up, as the discriminator of a GAN does."""
    model, other = Toy(2), fill(nn.Linear(5, 1), seed=5)
    optimizer = wrapped(model, rule)
    for step in range(5):
        losses = dict(zip("ab", model.losses(step), strict=True))
        if step >= 3:
            adversarial = square(other(model.trunk(data(6, 4, seed=step))))
            name = "adversarial" if as_task else "b"
            losses[name] = losses.get(name, 0) + adversarial
        optimizer.step(losses)
    assert all(parameter.grad is None for parameter in other.parameters())
    assert all(parameter.grad is not None for parameter in model.trunk.parameters())


def test_gradients_of_two_optimizers_do_not_meet() -> None:
    model = Toy()
    first, second = wrapped(model.trunk, "upgrad"), wrapped(model.heads, "upgrad")
    losses = model.losses()
    first.backward(losses, retain_graph=True)
    trunk = grads(model.trunk)
    second.backward(losses)
    assert_same(grads(model.trunk), trunk, 0)
    assert all(p.grad is not None for p in model.heads.parameters())


def test_half_of_the_gradients_cleared_by_hand() -> None:
    """Parameters without a gradient get their own storage back, next to those that kept it."""
    model = Toy()
    optimizer = wrapped(model, "mgda")
    optimizer.backward(model.losses())
    once = grads(model)
    for parameter in list(model.parameters())[::2]:
        parameter.grad = None
    optimizer.backward(model.losses())
    wanted = [g if i % 2 == 0 else 2 * g for i, g in enumerate(once) if g is not None]
    assert_same(grads(model), wanted, 1e-13)


@RULES
def test_strides_follow_the_parameters_through_fused_adamw(rule: str) -> None:
    """A contiguous gradient of a channels-last parameter makes fused AdamW silently wrong."""

    def run(base: Any, **options: Any) -> tuple[nn.Module, MTLOptimizer]:
        model = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3)))
        model.to(memory_format=torch.channels_last)
        image = data(2, 3, 7, 7, seed=1).contiguous(memory_format=torch.channels_last)
        optimizer = MTLOptimizer(base(model.parameters(), lr=1e-2, **options), rule)
        for k in range(3):
            z = model(image)
            optimizer.step([square(z - k), square(z.sin())])
        return model, optimizer

    fused, _ = run(torch.optim.AdamW, fused=True)
    looped, _ = run(torch.optim.AdamW, foreach=False)
    assert_same(fused.parameters(), looped.parameters(), 1e-12)
    for parameter in fused.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_model_that_changes_format_or_precision_in_between(rule: str) -> None:
    conv = fill(nn.Conv2d(3, 4, 3))
    optimizer = wrapped(conv, rule)

    def losses(dtype: torch.dtype) -> list[Tensor]:
        z = conv(data(2, 3, 6, 6, seed=1, dtype=dtype))
        return [square(z), square(z - 1)]

    optimizer.step(losses(torch.float64))
    conv.to(memory_format=torch.channels_last)
    optimizer.step(losses(torch.float64))
    assert conv.weight.grad is not None
    assert conv.weight.grad.stride() == conv.weight.stride()
    conv.float()
    optimizer.step(losses(torch.float32))
    assert conv.weight.grad.dtype == torch.float32
    assert conv.weight.grad.stride() == conv.weight.stride()
    wanted = expected_grads(losses(torch.float32), list(conv.parameters()), rule)
    if rule != "graddrop":
        optimizer.zero_grad()
        optimizer.backward(losses(torch.float32))
        assert_same(grads(conv), wanted, 1e-5)


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_gradients_whose_data_was_replaced(rule: str, engine: str) -> None:
    """Scripts write ``p.grad.data = p.grad.data / n``; later gradients must not be lost there."""
    model, alone = Toy(), Toy()
    touched, left = wrapped(model, rule, engine=engine), wrapped(alone, rule, engine=engine)
    for batch in range(3):
        touched.step(model.losses(batch))
        left.step(alone.losses(batch))
        assert_same(grads(model), grads(alone), 0)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.data = parameter.grad.data * 7.0


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "mgda", "nash_mtl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype, rule: str, engine: str) -> None:
    model = Toy().to(dtype)

    def losses() -> list[Tensor]:
        x = data(6, 4, seed=100, dtype=dtype)
        return [y.float().square().mean() for y in model(x)]

    optimizer = wrapped(model, rule, engine=engine, heads="plain")
    optimizer.backward(losses())
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {dtype}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if rule in ("ew", "mgda", "upgrad") and engine != "representation":
        wanted = expected_grads(losses(), list(model.parameters()), rule)
        assert_same([g.float() for g in grads(model)], [w.float() for w in wanted], 2e-2)
    optimizer.step()


def test_tiny_and_huge_gradients_in_single_precision() -> None:
    for size in (1e-30, 1e-15, 1e15, 1e30):
        weight = nn.Parameter(data(5, seed=1).float())
        rows = data(2, 5, seed=2).float() * size**0.5
        optimizer = wrapped([weight], "mgda", scale="native")
        optimizer.backward([row @ weight * size**0.5 for row in rows])
        wanted = rows.double() * size**0.5
        gram = wanted @ wanted.T / size**2
        share = ((gram[1, 1] - gram[0, 1]) / (gram[0, 0] + gram[1, 1] - 2 * gram[0, 1])).clamp(0, 1)
        assert_same([weight.grad.double()], [share * wanted[0] + (1 - share) * wanted[1]], 1e-5)


def test_sparse_gradients_stay_sparse_and_add_up() -> None:
    table = fill(nn.Embedding(9, 4, sparse=True))
    words = torch.tensor([1, 5, 5])
    optimizer = MTLOptimizer(torch.optim.SparseAdam(list(table.parameters())), "mgda")

    def losses() -> list[Tensor]:
        return [square(table(words)), square(table(words) - 1)]

    optimizer.backward(losses())
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse
    once = table.weight.grad.to_dense()
    optimizer.backward(losses())
    assert table.weight.grad.is_sparse
    assert_same([table.weight.grad], [2 * once], 1e-13)
    assert_same([once], expected_grads(losses(), [table.weight], "mgda"), 1e-10)
    optimizer.step()


@pytest.mark.parametrize("rule", ["ew", "upgrad", "mgda", "graddrop", "imtl"])
def test_every_rule_keeps_sparse_gradients_sparse(rule: str) -> None:
    table = fill(nn.Embedding(9, 4, sparse=True))
    words = torch.tensor([1, 5, 5])
    optimizer = MTLOptimizer(torch.optim.SparseAdam(list(table.parameters())), rule)
    for _ in range(2):
        optimizer.step([square(table(words)), square(table(words) - 1)])
    assert table.weight.grad is not None
    assert table.weight.grad.is_sparse


def test_fixed_weights_by_hand() -> None:
    weight = param(3, seed=1)
    optimizer = wrapped([weight], Fixed((2.0, -0.5)))
    optimizer.step([weight.square().sum(), weight.sum()])
    start = param(3, seed=1).detach()
    assert_same([weight.detach()], [start - 0.1 * (4 * start - 0.5)], 1e-14)


def test_retained_graph_can_be_used_again_and_again() -> None:
    for engine in (engines.Sequential(), engines.Batched(), engines.Representation()):
        for rule in ("ew", "upgrad", "uw"):
            model = Toy()
            optimizer = wrapped(model, rule, engine=engine)
            losses = model.losses()
            for _ in range(2):
                optimizer.backward(losses, retain_graph=True)
            twice = grads(model)
            optimizer.zero_grad()
            optimizer.backward(losses)
            assert_same(twice, [None if g is None else 2 * g for g in grads(model)], 1e-13)


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["upgrad", "graddrop"])
def test_reentrant_checkpoints_are_not_lost(rule: str, engine: str) -> None:
    """Parameters below one are not in the graph; training nothing in silence would be worst."""
    model = Toy()
    optimizer = wrapped(model, rule, engine=engine, lr=0.0)
    z = checkpoint(model.trunk, data(6, 4).requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.step([square(head(z)) for head in model.heads])
    assert grads(model) == [None] * 10


def test_reentrant_checkpoints_are_gone_through_where_one_pass_is_enough() -> None:
    model, plain = Toy(), Toy()
    optimizer = wrapped(model, "ew", lr=0.0)
    for _ in range(2):
        z = checkpoint(model.trunk, data(6, 4).requires_grad_(), use_reentrant=True)
        optimizer.step([square(head(z)) for head in model.heads])
        z = plain.trunk(data(6, 4))
        plain.zero_grad()
        sum(square(head(z)) for head in plain.heads).backward()
        assert_same(grads(model), grads(plain), 1e-13)


@pytest.mark.parametrize(
    ("rule", "engine", "dropout", "times"),
    [
        ("ew", "sequential", 0.0, 1),
        ("upgrad", "sequential", 0.0, 3),
        ("upgrad", "batched", 0.0, 1),
        ("upgrad", engines.Batched(chunk_size=2), 0.0, 2),
        ("upgrad", "representation", 0.0, 1),
        ("upgrad", "sequential", 0.5, 3),
        ("upgrad", "batched", 0.5, 3),
        ("upgrad", "representation", 0.5, 1),
    ],
)
def test_what_is_recomputed(rule: str, engine: Any, dropout: float, times: int) -> None:
    """A checkpoint is recomputed once per pass; with dropout the same entries are left out."""
    model, plain, calls = Toy(), Toy(), []
    for net in (model, plain):
        net.trunk.append(nn.Dropout(dropout))
    optimizer = wrapped(model, rule, engine=engine, lr=0.0)
    reference = wrapped(plain, rule, engine=engine, lr=0.0)
    model.trunk.register_forward_pre_hook(lambda *args: calls.append(1))
    torch.manual_seed(0)
    z = checkpoint(model.trunk, data(6, 4), use_reentrant=False)
    calls.clear()
    optimizer.step([square(head(z)) for head in model.heads])
    torch.manual_seed(0)
    z = plain.trunk(data(6, 4))
    reference.step([square(head(z)) for head in plain.heads])
    assert_same(grads(model), grads(plain), 1e-9)
    assert len(calls) == times + (times == 3 and engine == "batched")  # the try that failed


@pytest.mark.parametrize("rule", ["ew", "uw"])
def test_reentrant_checkpoints_that_start_later(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule, lr=0.0)
    optimizer.step(model.losses())
    z = checkpoint(model.trunk, data(6, 4).requires_grad_(), use_reentrant=True)
    optimizer.step([square(head(z)) for head in model.heads])
    assert all(p.grad is not None for p in model.trunk.parameters())


def test_a_checkpoint_that_looks_like_the_layer_it_hides_is_noticed() -> None:
    """One node stands for one node, so nothing but the missing gradient tells."""
    conv = fill(nn.Conv1d(3, 3, 1, bias=False))
    heads = fill(nn.ModuleList(nn.Linear(4, 1) for _ in range(2)), seed=7)
    optimizer = wrapped(nn.ModuleList([conv, heads]), "ew")
    image = data(5, 3, 4)

    def losses(reentrant: bool) -> list[Tensor]:
        given = image.clone().requires_grad_()
        z = checkpoint(conv, given, use_reentrant=True) if reentrant else conv(given)
        return [square(head(z)) for head in heads]

    for _ in range(3):
        optimizer.step(losses(reentrant=False))
    before = frozen_copy(dict(conv.named_parameters()))
    with pytest.raises(
        RuntimeError,
        match=re.escape(
            "MTLOptimizer: a reentrant checkpoint appeared in the graph after the first steps and "
            "hides its parameters; nothing was changed. Compute the losses again and repeat the "
            "step, or pass use_reentrant=False to torch's checkpoint."
        ),
    ):
        optimizer.step(losses(reentrant=True))
    assert frozen_copy(dict(conv.named_parameters())) == before
    optimizer.step(losses(reentrant=True))
    assert conv.weight.grad is not None


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_saved_tensors_are_freed(rule: str, engine: str) -> None:
    """As by ``loss.backward()``, though the losses themselves live on in a variable."""
    model = Toy()
    losses = model.losses()
    wrapped(model, rule, engine=engine).step(losses)
    for loss in losses:
        assert loss.grad_fn is not None
        power = loss.grad_fn.next_functions[0][0]
        with pytest.raises(RuntimeError, match="after they have already been freed"):
            power._saved_self  # type: ignore[union-attr]  # noqa: B018  # of PowBackward0


def test_complex_parameters_are_pairs_of_real_ones() -> None:
    start = torch.complex(data(3, seed=1), data(3, seed=2))
    whole = nn.Parameter(start.clone())
    pairs = nn.Parameter(torch.view_as_real(start).clone())

    def losses(z: Tensor) -> list[Tensor]:
        return [(z - 1).abs().square().sum(), (z + 1j).abs().square().sum(), z.imag.sum()]

    for rule in ("ew", "upgrad", "mgda"):
        whole.grad = pairs.grad = None
        wrapped([whole], rule).backward(losses(whole))
        wrapped([pairs], rule).backward(losses(torch.view_as_complex(pairs)))
        assert whole.grad is not None
        assert_same([torch.view_as_real(whole.grad)], [pairs.grad], 1e-12)


def one_pass(losses: Callable[[Tensor], list[Tensor]], params: list[Tensor]) -> list[Tensor | None]:
    """Go down once from a representation, with weights that are all 1."""
    optimizer = wrapped(params, Fixed((1.0, 1.0)), engine="representation", heads="plain")
    optimizer.backward(losses(data(3, 4)))
    return [param.grad for param in params]


def test_gradients_that_share_storage_become_tensors_of_their_own() -> None:
    """One gradient for two parameters, or two that are pieces of one."""
    a, b, c, d = (param(4, 5, seed=seed) for seed in range(4))
    own = [param(5, seed=5), param(10, seed=6)]

    def losses(x: Tensor) -> list[Tensor]:
        z = torch.cat([x @ (a + b), x @ torch.cat([c, d])[:4]], dim=1).tanh()
        return [square(z[:, :5] @ own[0]), square(z @ own[1])]

    params = [a, b, c, d, *own]
    found = one_pass(losses, params)
    storages = {grad.untyped_storage()._cdata for grad in found if grad is not None}
    assert len(storages) == 6
    wanted = torch.autograd.grad(sum(losses(data(3, 4))), params)
    assert_same(found, list(wanted), 1e-12)
    for grad in found:
        assert grad is not None
        assert grad.untyped_storage().nbytes() == grad.nbytes


def test_gradients_that_a_hook_keeps_stay_the_hooks() -> None:
    weight, own, kept = param(4, 5, seed=1), [param(5, seed=2), param(5, seed=3)], []
    weight.register_hook(kept.append)

    def losses(x: Tensor) -> list[Tensor]:
        z = (x @ weight).tanh()
        return [square(z @ mine) for mine in own]

    found = one_pass(losses, [weight, *own])
    assert found[0] is not None
    before = kept[-1].clone()
    found[0].zero_()
    assert_same([kept[-1]], [before], 0)
