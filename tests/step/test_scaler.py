"""``GradScaler``: raw losses, true gradients for the rule, stock ``unscale_`` and ``step``."""

from typing import Any

import pytest
import torch
from cases import ONE_BATCH
from models import (
    Overflow,
    Toy,
    assert_same,
    data,
    expected_grads,
    frozen_copy,
    grads,
    lone_rows,
    scaled_step,
    scaler,
    spoiled,
    wrapped,
)
from torch import Tensor, nn
from torch.amp import GradScaler

from gradbal import MTLOptimizer, aggregate

ALL = pytest.mark.parametrize("rule", ONE_BATCH)
ENGINES = pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])


@ALL
@pytest.mark.parametrize("heads", ["plain", None])
def test_training_with_and_without_a_scaler_is_the_same(rule: str, heads: str | None) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule, heads=heads), wrapped(plain, rule, heads=heads)
    scale = scaler()
    for batch in range(4):
        scaled_step(optimizer, model.named(batch), scale)
        reference.step(plain.named(batch))
        assert_same(model.parameters(), plain.parameters(), 1e-9)
    ours, theirs = optimizer.last, reference.last
    assert ours is not None
    assert theirs is not None
    assert_same(ours.grams.values(), theirs.grams.values(), 1e-9)
    assert_same([ours.losses], [theirs.losses], 1e-9)
    assert scale.get_scale() == 2.0**16


@ENGINES
@pytest.mark.parametrize("rule", ["ew", "upgrad", "nash_mtl", "uw", "imtl"])
def test_gradients_are_left_scaled(rule: str, engine: str) -> None:
    model, plain = Toy(), Toy()
    wrapped(plain, rule, engine=engine).backward(plain.losses())
    wrapped(model, rule, engine=engine).backward(model.losses(), scaler=scaler(1024.0))
    assert_same(grads(model), [1024 * g for g in grads(plain) if g is not None], 1e-12)


@ALL
@pytest.mark.parametrize("heads", ["plain", None])
@pytest.mark.parametrize("how", ["nan", "gradient"])
def test_overflow_skips_lowers_the_scale_and_leaves_the_rule_alone(
    rule: str, heads: str | None, how: str
) -> None:
    model = Toy()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer, scale = MTLOptimizer(base, rule, heads=heads), scaler(1024.0)
    scaled_step(optimizer, model.named(0), scale)
    before = frozen_copy([dict(model.state_dict()), optimizer.state_dict()])
    before[1]["gradbal"]["step"][0].pop("skipped")
    scaled_step(optimizer, spoiled(model, 1, how), scale)
    after = frozen_copy([dict(model.state_dict()), optimizer.state_dict()])
    after[1]["gradbal"]["step"][0].pop("skipped")
    assert after == before
    assert scale.get_scale() == 512
    scaled_step(optimizer, model.named(2), scale)
    assert frozen_copy(dict(model.state_dict())) != before[0]


@pytest.mark.parametrize("options", [{"engine": "representation"}, {"update_every": 2}])
@pytest.mark.parametrize("rule", ["upgrad", "gradvac", "nash_mtl", "uw", "rlw", "famo"])
def test_overflow_below_the_cut(rule: str, options: dict[str, Any]) -> None:
    """The Gram matrix is finite, or not looked at; the gradient that is pulled down is not."""
    model = Toy()
    optimizer, scale = wrapped(model, rule, heads="plain", **options), scaler(1024.0)
    scaled_step(optimizer, model.named(0), scale)
    before = frozen_copy([dict(model.state_dict()), optimizer.state_dict()])
    z = Overflow.apply(model.trunk(torch.ones(6, 4).double()))
    losses = {name: head(z).square().mean() for name, head in zip("abc", model.heads, strict=True)}
    scaled_step(optimizer, losses, scale)
    after = frozen_copy([dict(model.state_dict()), optimizer.state_dict()])
    for state in (before, after):
        state[1]["gradbal"]["step"][0].pop("skipped")
    assert after == before
    assert scale.get_scale() == 512


@pytest.mark.parametrize("option", ["raise", "skip", "propagate"])
def test_the_scalers_skip_replaces_ours(option: str) -> None:
    model = Toy()
    optimizer, scale = wrapped(model, "upgrad", on_nonfinite=option), scaler(1024.0)
    before = frozen_copy(dict(model.state_dict()))
    scaled_step(optimizer, spoiled(model, 0, "inf"), scale)
    assert frozen_copy(dict(model.state_dict())) == before
    assert scale.get_scale() == 512


@pytest.mark.parametrize("rule", ["ew", "upgrad", "nash_mtl"])
def test_clipping_between_unscale_and_step(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(plain, rule)
    scale = scaler()
    for batch in range(3):
        optimizer.zero_grad()
        optimizer.backward(model.losses(batch), scaler=scale)
        scale.unscale_(optimizer)
        mine = nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        scale.step(optimizer)
        scale.update()
        reference.zero_grad()
        reference.backward(plain.losses(batch))
        theirs = nn.utils.clip_grad_norm_(plain.parameters(), 0.2)
        reference.step()
        assert_same([mine], [theirs], 1e-9)
        assert_same(model.parameters(), plain.parameters(), 1e-9)


def test_fused_base_under_a_scaler() -> None:
    """The scaler must not take the fused base's own unscaling for the wrapper's."""
    model, plain = Toy().float(), Toy().float()
    ours = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), "ew")
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    scale = scaler()
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    for _ in range(3):
        scaled_step(ours, [y.square().mean() for y in model(x)], scale)
        reference.zero_grad()
        sum(y.square().mean() for y in plain(x)).backward()
        reference.step()
    assert_same(model.parameters(), plain.parameters(), 1e-5)
    assert max(float(p.detach().abs().max()) for p in model.parameters()) < 3


@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop", "nash_mtl"])
def test_auxiliary_losses_are_scaled_too(rule: str) -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, rule), wrapped(plain, rule)
    scale = scaler()
    aux, own = model.trunk[0].weight.square().sum(), plain.trunk[0].weight.square().sum()
    scaled_step(optimizer, model.losses(), scale, aux=aux)
    reference.step(plain.losses(), aux=own)
    assert_same(model.parameters(), plain.parameters(), 1e-10)


@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_auxiliary_losses_that_overflow_skip_the_step(rule: str) -> None:
    model = Toy()
    optimizer, scale = wrapped(model, rule), scaler(1024.0)
    before = frozen_copy(dict(model.state_dict()))
    scaled_step(optimizer, model.losses(), scale, aux=model.trunk[0].weight.sum() * float("inf"))
    assert frozen_copy(dict(model.state_dict())) == before
    assert scale.get_scale() == 512


@pytest.mark.parametrize("rule", ["uw", "upgrad", "nash_mtl", "graddrop"])
def test_accumulation_under_a_scaler(rule: str) -> None:
    whole, parts = Toy(), Toy()
    wrapped(whole, rule).step(whole.losses())
    optimizer, scale = wrapped(parts, rule), scaler()
    for k in range(3):
        losses = [loss / 3 for loss in parts.losses(0, slice(2 * k, 2 * k + 2))]
        optimizer.backward(losses, scaler=scale, accumulate=k < 2)
    scale.step(optimizer)
    scale.update()
    assert_same(parts.parameters(), whole.parameters(), 1e-9)


@pytest.mark.parametrize("rule", ["uw", "upgrad"])
def test_a_piece_that_overflows_skips_the_window(rule: str) -> None:
    model = Toy()
    optimizer, scale = wrapped(model, rule), scaler(1024.0)
    before = frozen_copy(dict(model.state_dict()))
    optimizer.backward(spoiled(model, 0, "gradient"), scaler=scale, accumulate=True)
    optimizer.backward(model.named(1), scaler=scale)
    scale.step(optimizer)
    scale.update()
    assert frozen_copy(dict(model.state_dict())) == before
    assert scale.get_scale() == 512
    assert not optimizer.core.contents()["pending"]["rows"]


def test_half_precision_gradients_do_not_vanish() -> None:
    """Losses of 1e-7 give gradients below the smallest half; scaled, they are right to 1e-2."""
    model = Toy().half()
    x = torch.linspace(-1, 1, 24).reshape(6, 4).half()

    def losses() -> list[Tensor]:
        return [y.float().square().mean() * 1e-7 for y in model(x)]

    optimizer = wrapped(model, "mgda")
    optimizer.backward(losses())
    assert optimizer.last is not None
    lost = optimizer.last.grams["model"]
    optimizer.zero_grad()
    optimizer.backward(losses(), scaler=scaler())
    found = optimizer.last.grams["model"]
    rows = lone_rows([loss * 1e7 for loss in losses()], list(model.trunk.parameters()))
    flat = torch.stack(
        [torch.cat([g.double().reshape(-1) for g in row if g is not None]) for row in rows]
    )
    assert_same([found * 1e14], [flat @ flat.T], 2e-2)
    assert float((lost * 1e14 - flat @ flat.T).abs().max()) > 0.1 * float((flat @ flat.T).max())


def test_disabled_scaler_changes_nothing() -> None:
    model, plain = Toy(), Toy()
    scale = GradScaler("cpu", enabled=False)
    scaled_step(wrapped(model, "upgrad"), model.losses(), scale)
    wrapped(plain, "upgrad").step(plain.losses())
    assert_same(model.parameters(), plain.parameters(), 0)


def test_reused_weights_under_a_scaler() -> None:
    model, plain = Toy(), Toy()
    optimizer = wrapped(model, "upgrad", update_every=3)
    reference = wrapped(plain, "upgrad", update_every=3)
    scale = scaler()
    for batch in range(5):
        scaled_step(optimizer, model.losses(batch), scale)
        reference.step(plain.losses(batch))
    assert_same(model.parameters(), plain.parameters(), 1e-9)


def test_scale_that_grows() -> None:
    model, plain = Toy(), Toy()
    optimizer, reference = wrapped(model, "nash_mtl"), wrapped(plain, "nash_mtl")
    scale = scaler(2.0, growth_interval=1)
    for batch in range(6):
        scaled_step(optimizer, model.losses(batch), scale)
        reference.step(plain.losses(batch))
    assert scale.get_scale() == 128
    assert_same(model.parameters(), plain.parameters(), 1e-9)


# ---------------------------------------------------------------------- autocast


def cast_losses(model: Toy, batch: int, dtype: torch.dtype, size: float = 1.0) -> list[Tensor]:
    """Losses of a single precision model whose layers run in half precision."""
    x = data(6, 4, seed=batch, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(x)
    return [size * (y.float() - k).square().mean() for k, y in enumerate(outputs)]


@pytest.mark.parametrize("rule", ["ew", "upgrad", "mgda", "imtl_g"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_as_by_hand(dtype: torch.dtype, rule: str) -> None:
    """Against lone passes, ``aggregate``, clipping and the base; float16 with a scaler."""
    model, plain = Toy().float(), Toy().float()
    optimizer = MTLOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), rule)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    scale = scaler(2.0**10, enabled=dtype == torch.float16)
    for batch in range(5):
        optimizer.zero_grad()
        optimizer.backward(cast_losses(model, batch, dtype), scaler=scale)
        scale.unscale_(optimizer)
        wanted = expected_grads(cast_losses(plain, batch, dtype), list(plain.parameters()), rule)
        assert_same(grads(model), wanted, 3e-3)  # rounding of half precision rows
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scale.step(optimizer)
        scale.update()
        for parameter, mine in zip(plain.parameters(), model.parameters(), strict=True):
            parameter.grad = None if mine.grad is None else mine.grad.clone()
        reference.step()
        assert_same(model.parameters(), plain.parameters(), 0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("rule", ["upgrad", "uw"])
def test_underflow_under_autocast_is_recovered(rule: str) -> None:
    """Gradients of activations are float16: below 6e-8 they are zero unless they are scaled."""
    model, full = Toy().float(), Toy().float()
    rows = lone_rows(cast_losses(full, 0, torch.bfloat16, 1e-8), list(full.trunk.parameters()))
    wanted = [sum(g.norm().item() ** 2 for g in row if g is not None) for row in rows]
    optimizer = wrapped(model, rule, heads="plain", lr=1e6)
    gradients = wrapped(model, "mgda")  # a rule that looks at gradients, to see its Gram matrix
    gradients.backward(cast_losses(model, 0, torch.float16, 1e-8))
    assert gradients.last is not None
    assert not gradients.last.grams["model"].any()
    gradients.zero_grad()
    scale = scaler()
    gradients.backward(cast_losses(model, 0, torch.float16, 1e-8), scaler=scale)
    found = gradients.last.grams["model"].diagonal()
    assert found.tolist() == pytest.approx(wanted, rel=0.03)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.backward(cast_losses(model, 0, torch.float16, 1e-8), scaler=scale)
    scale.step(optimizer)
    assert any(
        not torch.equal(p, old) for p, old in zip(model.trunk.parameters(), before, strict=False)
    )


@pytest.mark.parametrize("rule", ["upgrad", "gradvac", "uw"])
def test_overflow_of_one_task_under_autocast(rule: str) -> None:
    model = Toy().float()
    optimizer, scale = wrapped(model, rule), scaler(2.0**10)
    scaled_step(optimizer, cast_losses(model, 0, torch.float16), scale)
    before = frozen_copy([dict(model.state_dict()), optimizer.core.contents()["state"]])
    one, two, three = cast_losses(model, 1, torch.float16)
    scaled_step(
        optimizer, [one, two * 1e6, three], scale
    )  # its activations' gradients exceed 65504
    after = frozen_copy([dict(model.state_dict()), optimizer.core.contents()["state"]])
    assert after == before
    assert scale.get_scale() == 2.0**9


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop", "uw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_call_inside_an_autocast_block_is_as_one_outside(
    dtype: torch.dtype, rule: str, engine: str
) -> None:
    """Gram matrices and directions are not cast, so nothing is rounded or overflows."""
    inside, outside = Toy().float(), Toy().float()
    ours, reference = (wrapped(net, rule, engine=engine) for net in (inside, outside))
    for batch in range(3):
        losses = [1e3 * loss for loss in cast_losses(inside, batch, dtype)]
        with torch.autocast("cpu", dtype=dtype):
            ours.backward(losses)
            assert torch.is_autocast_enabled("cpu")
        reference.backward([1e3 * loss for loss in cast_losses(outside, batch, dtype)])
        assert_same(grads(inside), grads(outside), 0)
        for optimizer in (ours, reference):
            optimizer.zero_grad()
    losses = cast_losses(inside, 0, dtype)
    deviations = ours.check(losses)
    with torch.autocast("cpu", dtype=dtype):
        assert ours.check(losses) == deviations


@pytest.mark.parametrize("rule", ["upgrad", "graddrop"])
def test_aggregate_inside_an_autocast_block(rule: str) -> None:
    jacobian = data(3, 40, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = aggregate(jacobian, rule).direction
    assert torch.equal(found, aggregate(jacobian, rule).direction)
