"""Which tasks take part: absent ones, new ones, lone ones, and what is remembered of them."""

import re
from typing import Any

import pytest
import torch
from models import (
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

ROWS = {  # rules with state, and the names of what they keep per task
    "uw": ["log_variance"],
    "imtl_l": ["log_scale"],
    "imtl": ["log_scale"],
    "dwa": ["total", "count"],
    "gradnorm": ["weights", "initial"],
    "famo": ["logits", "before"],
}


def named(model: Toy, names: str, batch: int = 0) -> dict[str, Tensor]:
    return {name: loss for name, loss in model.named(batch).items() if name in names}


@pytest.mark.parametrize("rule", ROWS)
@pytest.mark.parametrize("way", ["missing", "without graph"])
def test_rows_of_an_absent_task_are_frozen(rule: str, way: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    for batch in range(3):
        optimizer.step(named(model, "abc", batch))
    if rule == "famo":  # what it waits for of the last step comes with the next full one
        optimizer.core.awaiting.clear()
    before = frozen_copy({k: v[1] for k, v in state(optimizer).items() if v.ndim})
    others = frozen_copy({k: v[[0, 2]] for k, v in state(optimizer).items() if v.ndim})
    for batch in range(3, 6):
        losses = named(model, "ac", batch)
        if way == "without graph":
            losses = {"a": losses["a"], "b": torch.ones(()).double(), "c": losses["c"]}
        optimizer.step(losses)
        assert optimizer.last is not None
        assert optimizer.last.tasks == ("a", "c")
    assert frozen_copy({k: v[1] for k, v in state(optimizer).items() if v.ndim}) == before
    after = frozen_copy({k: v[[0, 2]] for k, v in state(optimizer).items() if v.ndim})
    assert all(after[name] != others[name] for name in ROWS[rule] if name != "initial")


def state(optimizer: Any) -> dict[str, Tensor]:
    return optimizer.core.contents()["state"]["groups"]["model"]


def test_square_state_is_frozen_in_rows_and_columns() -> None:
    model = Toy()
    optimizer = wrapped(model, "gradvac")
    for batch in range(2):
        optimizer.step(named(model, "abc", batch))
    before = state(optimizer)["target"].clone()
    optimizer.step(named(model, "ac", 2))
    after = state(optimizer)["target"]
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[:, 1], before[:, 1])
    assert not torch.equal(after[0, 2], before[0, 2])


@pytest.mark.parametrize("rule", ["dwa", "gradnorm", "rlw", "famo", "mgda", "cagrad"])
def test_weights_sum_to_the_number_of_present_tasks(rule: str) -> None:
    model = Toy(4)
    optimizer = wrapped(model, rule)
    for batch, names in enumerate(("abcd", "abd", "bc", "abcd", "d")):
        optimizer.step(named(model, names, batch))
        assert optimizer.last is not None
        assert optimizer.last.weights is not None
        if rule != "cagrad":  # sums to 1 around the mean, before it is shortened
            assert float(optimizer.last.weights.sum()) == pytest.approx(len(names))
        assert optimizer.last.tasks == tuple(names)


@pytest.mark.parametrize("rule", ["ew", "upgrad", "mgda", "imtl_g", "pcgrad", "graddrop"])
def test_gradients_with_an_absent_task_are_those_of_the_others(rule: str) -> None:
    model = Toy(3)
    params = list(model.parameters())
    optimizer = wrapped(model, rule, lr=0.0)
    optimizer.step(named(model, "abc"))
    optimizer.step(named(model, "bc", 1))
    if rule != "graddrop":  # draws by chance
        losses = list(named(model, "bc", 1).values())
        assert_same(grads(params), expected_grads(losses, params, rule), 1e-9)
    assert all(p.grad is None for p in model.heads[0].parameters())


def test_lone_task_goes_through_the_rule_once_the_sharing_is_known() -> None:
    model = Toy(2)
    for parameter in model.heads.parameters():
        parameter.data *= 50  # so that Nash-MTL's limit on the norm is met
    optimizer = wrapped(model, "nash_mtl", lr=0.0)
    optimizer.step(named(model, "ab"))
    optimizer.step(named(model, "a", 1))
    shared = list(model.trunk.parameters())
    (row,) = lone_rows([model.losses(1)[0]], shared)
    flat = torch.cat([g.reshape(-1) for g in row if g is not None])
    wanted = aggregate(flat[None], "nash_mtl").direction
    found = torch.cat([g.reshape(-1) for g in grads(shared) if g is not None])
    assert float(wanted.norm()) == pytest.approx(1)
    assert_same([found], [wanted])


def test_lone_task_before_any_sharing_is_plain_training() -> None:
    model = Toy(2)
    for rule in ("nash_mtl", "upgrad", "graddrop", "mgda"):
        optimizer = wrapped(model, rule, lr=0.0)
        optimizer.step(named(model, "a"))
        (row,) = lone_rows([model.losses()[0]], list(model.parameters()))
        assert_same(grads(model), row)


def test_sharing_is_the_union_over_steps() -> None:
    """Tasks that come one at a time: the second is seen to share, and the first from then on."""
    model = Toy(2)
    model.trunk[0].weight.data *= 20
    optimizer = wrapped(model, "nash_mtl", lr=0.0)
    norms = []
    for name in "abab":
        optimizer.step(named(model, name))
        norms.append(torch.cat([p.grad.reshape(-1) for p in model.trunk.parameters()]).norm())
    plain = [
        torch.cat([g.reshape(-1) for g in row if g is not None]).norm()
        for row in lone_rows(model.losses(), list(model.trunk.parameters()))
    ]
    assert float(norms[0]) == pytest.approx(float(plain[0]))
    assert all(float(norm) <= 1 + 1e-12 for norm in norms[1:])
    assert set(optimizer.core.contents()["tasks"]["sets"].values()) == {0b01, 0b10, 0b11}


def test_new_names_grow_the_state() -> None:
    model = Toy(4)
    optimizer = wrapped(model, "uw")
    optimizer.step(named(model, "ac"))
    old = state(optimizer)["log_variance"].clone()
    optimizer.step(named(model, "abd"))
    new = state(optimizer)["log_variance"]
    assert optimizer.core.contents()["tasks"]["names"] == ["a", "c", "b", "d"]
    assert new.shape == (4,)
    assert torch.equal(new[1], old[1])  # task c was absent
    assert bool((new[[0, 2, 3]] != 0).all())


def test_new_names_grow_square_state_and_rows() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "gradvac")
    optimizer.step(named(model, "ab"))
    old = state(optimizer)["target"].clone()
    optimizer.step(named(model, "c"))
    optimizer.step(named(model, "abc", 1))
    assert state(optimizer)["target"].shape == (3, 3)
    assert old.shape == (2, 2)


def test_order_of_a_mapping_does_not_matter() -> None:
    one, two = Toy(3), Toy(3)
    first, second = wrapped(one, "uw"), wrapped(two, "uw")
    for batch in range(3):
        first.step(one.named(batch))
        losses = two.named(batch)
        order = "cab" if batch else "abc"
        second.step({name: losses[name] for name in order})
        assert_same(one.parameters(), two.parameters(), 1e-12)
        assert_same([state(first)["log_variance"]], [state(second)["log_variance"]], 1e-12)


def test_a_list_takes_the_names_in_their_order() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "uw", tasks=["depth", "seg", "normals"])
    optimizer.step(model.losses())
    assert set(optimizer.metrics()) >= {"gradbal/weight/depth", "gradbal/weight/normals"}
    optimizer.step(dict(zip(["seg", "depth"], model.losses(1)[:2], strict=True)))
    assert optimizer.last is not None
    assert optimizer.last.tasks == ("seg", "depth")


def test_numbered_tasks_get_their_names_from_the_first_mapping() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "uw", tasks=3)
    assert optimizer.core.contents()["tasks"]["names"] == ["0", "1", "2"]
    optimizer.step(model.named())
    assert optimizer.core.contents()["tasks"]["names"] == ["a", "b", "c"]


def test_tasks_fix_the_size_of_the_state_before_the_first_step() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "uw", tasks=["a", "b", "c"])
    optimizer.step(named(model, "b"))
    assert state(optimizer)["log_variance"].shape == (3,)
    assert frozen_copy(state(optimizer)["log_variance"][[0, 2]]) == frozen_copy(
        torch.full((2,), torch.inf).double()  # they start at their first losses
    )


@pytest.mark.parametrize("count", [2, 4])
def test_a_list_of_another_length_is_an_error(count: int) -> None:
    model = Toy(4)
    optimizer = wrapped(model, "upgrad")
    optimizer.step(model.losses()[:3])
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"Losses: expected one loss for each of the 3 tasks (0, 1, 2), got {count}; give a "
            "mapping to leave tasks out."
        ),
    ):
        optimizer.step(model.losses()[:count])


def test_options_with_one_number_per_task_follow_the_present_ones() -> None:
    model = Toy(3)
    rule = make_rule("upgrad", preferences=(0.7, 0.2, 0.1))
    optimizer = wrapped(model, rule, lr=0.0, scale="native")
    optimizer.step(model.named())
    optimizer.step(named(model, "ac", 1))
    shared = list(model.trunk.parameters())
    rows = lone_rows([model.losses(1)[0], model.losses(1)[2]], shared)
    matrix = torch.stack([torch.cat([g.reshape(-1) for g in r if g is not None]) for r in rows])
    wanted = aggregate(matrix, make_rule("upgrad", preferences=(0.7, 0.1))).direction
    found = torch.cat([g.reshape(-1) for g in grads(shared) if g is not None])
    assert_same([found], [wanted], 1e-9)


# ---------------------------------------------------------------------- shared=


def test_shared_given_as_a_module_a_tensor_or_a_list() -> None:
    model = Toy(3)
    params = list(model.parameters())
    for shared in (model.trunk, list(model.trunk.parameters()), [model.trunk[0], model.trunk[2]]):
        wanted = expected_grads(model.losses(), params, "upgrad")
        wrapped(model, "upgrad", shared=shared).backward(model.losses())
        assert_same(grads(params), wanted, 1e-9)
        model.zero_grad()


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize(("shared", "other"), [(2, 0), (0, 2)])
def test_shared_parameters_that_are_left_out_get_the_plain_sum(
    shared: int, other: int, engine: str
) -> None:
    """They lie below the cut, so the pass through a head goes on and must leave the graph."""
    model = Toy(3)
    optimizer = wrapped(model, "mgda", shared=model.trunk[shared], engine=engine)
    optimizer.backward(model.losses())
    plain = Toy(3)
    sum(plain.losses()).backward()
    assert_same(grads(model.trunk[other]), grads(plain.trunk[other]))
    assert_same(grads(model.heads), grads(plain.heads))
    positions = list(model.trunk[shared].parameters())
    rows = lone_rows(model.losses(), positions)
    matrix = torch.stack([torch.cat([g.reshape(-1) for g in r if g is not None]) for r in rows])
    found = torch.cat([p.grad.reshape(-1) for p in positions])
    assert_same([found], [3 * aggregate(matrix, "mgda").direction], 1e-9)


def test_a_trunk_that_is_left_out_as_a_whole_gets_the_plain_sum() -> None:
    model, plain = Toy(3), Toy(3)
    optimizer = wrapped(model, "mgda", shared=model.heads[0])
    optimizer.backward(model.losses())
    sum(plain.losses()).backward()
    for part in (0, 2):
        assert_same(grads(model.trunk[part]), grads(plain.trunk[part]))
    assert_same(grads(model.heads[1:]), grads(plain.heads[1:]))


def test_parameters_of_one_task_may_be_declared_shared() -> None:
    model = Toy(2)
    optimizer = wrapped(model, "mgda", shared=model, scale="native")
    optimizer.backward(model.losses())
    rows = lone_rows(model.losses(), list(model.parameters()))
    flat = [
        torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1)
                for g, p in zip(row, model.parameters(), strict=True)
            ]
        )
        for row in rows
    ]
    found = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert_same([found], [aggregate(torch.stack(flat), "mgda").direction], 1e-9)


def test_freezing_during_training() -> None:
    model = Toy(3)
    params = list(model.parameters())
    optimizer = wrapped(model, "upgrad")
    for batch in range(5):
        model.trunk[0].requires_grad_(batch not in (1, 2))
        wanted = expected_grads(model.losses(batch), params, "upgrad")
        optimizer.step(model.losses(batch))
        assert_same(grads(params), wanted, 1e-9)
        assert (model.trunk[0].weight.grad is None) == (batch in (1, 2))


def test_parameters_that_join_later() -> None:
    model = Toy(3)
    optimizer = wrapped(model.trunk, "upgrad")
    optimizer.step(model.losses())
    optimizer.add_param_group({"params": model.heads.parameters(), "lr": 1.0})
    params = [*model.trunk.parameters(), *model.heads.parameters()]
    wanted = expected_grads(model.losses(1), params, "upgrad")
    optimizer.step(model.losses(1))
    assert_same(grads(params), wanted, 1e-9)


def test_parameters_that_leave() -> None:
    """What was learned of a parameter stays with it when the others move up."""
    model = Toy(3)
    groups = [model.heads[0], model.heads[1], model.trunk, model.heads[2]]
    base = torch.optim.SGD([{"params": part.parameters()} for part in groups], lr=0.0)
    optimizer = MTLOptimizer(base, "nash_mtl", heads="plain")
    optimizer.step(model.named())
    del base.param_groups[0]
    optimizer.step(model.named(1))
    sets = optimizer.core.contents()["tasks"]["sets"]
    assert [sets[n] for n in range(8)] == [2, 2, 7, 7, 7, 7, 4, 4]
    rows = lone_rows(model.losses(1), list(model.heads[2].parameters()))
    assert_same(grads(model.heads[2]), rows[2])


def test_shared_parameters_given_by_the_user_stay_the_same_when_others_leave() -> None:
    model = Toy(3)
    optimizer = wrapped(model, "mgda", shared=model.trunk)
    optimizer.step(model.losses())
    del optimizer.param_groups[0]["params"][0]
    params = list(model.parameters())[1:]
    wanted = expected_grads(model.losses(1), params, "mgda")
    optimizer.step(model.losses(1))
    assert_same(grads(params), wanted, 1e-9)


def test_parameters_in_two_groups_with_different_rates() -> None:
    model = Toy(2)
    start = [p.detach().clone() for p in model.parameters()]
    base = torch.optim.SGD(
        [
            {"params": [model.trunk[0].weight, *model.heads.parameters()], "lr": 0.5},
            {"params": [model.trunk[0].bias, *model.trunk[2].parameters()], "lr": 0.01},
        ]
    )
    optimizer = MTLOptimizer(base, "mgda")
    wanted = expected_grads(model.losses(), list(model.parameters()), "mgda")
    optimizer.step(model.losses())
    slow = {id(p) for p in base.param_groups[1]["params"]}
    for p, s, g in zip(model.parameters(), start, wanted, strict=True):
        assert g is not None
        assert_same([p], [s - (0.01 if id(p) in slow else 0.5) * g], 1e-9)


@pytest.mark.parametrize("engine", ["sequential", "batched", "representation"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "nash_mtl", "graddrop", "imtl"])
def test_present_task_that_reaches_nothing_shared(rule: str, engine: str) -> None:
    model, apart = Toy(2), param(3, seed=4)
    optimizer = wrapped([*model.parameters(), apart], rule, engine=engine, lr=0.0)
    a, b = model.losses()
    optimizer.step({"a": a, "b": b, "c": square(apart - 1)})
    optimizer.step({"c": square(apart - 1)})
    (row,) = lone_rows([square(apart - 1)], [apart])
    assert_same([apart.grad], row)
    assert grads(model) == [None] * 8
    optimizer.step({"a": model.losses()[0], "c": square(apart - 1)})
    assert all(p.grad is not None for p in model.trunk.parameters())


def test_tasks_with_nothing_in_common_do_not_meet() -> None:
    a, b = param(3, seed=1), param(2, seed=2)
    for rule in ("upgrad", "mgda", "nash_mtl", "graddrop", "imtl_g"):
        optimizer = wrapped([a, b], rule, lr=0.0)
        optimizer.step([square(a - 1), square(b)])
        rows = lone_rows([square(a - 1), square(b)], [a, b])
        assert_same([a.grad, b.grad], [rows[0][0], rows[1][1]])
