"""``groups``: surgery per tensor or per named group, each over the tasks that reach it."""

from typing import Any

import pytest
import torch
from models import (
    Toy,
    assert_same,
    frozen_copy,
    grads,
    jacobian,
    lone_rows,
    param,
    scaled,
    square,
    wrapped,
)
from torch import Tensor

from gradbal import aggregate

RULES = pytest.mark.parametrize("rule", ["upgrad", "mgda", "cagrad", "imtl_g", "gradvac"])


class Partly:
    """Three tasks over a common stem and two parts that two of them share."""

    def __init__(self) -> None:
        self.stem, self.left, self.right = (param(4, 4, seed=i) for i in range(3))
        self.own = [param(4, seed=5 + i) for i in range(3)]
        self.params = [self.stem, self.left, self.right, *self.own]

    def losses(self, batch: int = 0) -> list[Tensor]:
        x = torch.linspace(-1, 1 + batch, 24).double().reshape(6, 4)
        z = (x @ self.stem).tanh()
        a, b = (z @ self.left).tanh(), (z @ self.right).tanh()
        return [
            square(a @ self.own[0] - 1),
            square((a + b) @ self.own[1]),
            square(b @ self.own[2] + 1),
        ]

    def expected(self, rule: str, groups: list[list[Tensor]]) -> list[Tensor]:
        """Aggregate every group by itself, over the tasks that reach it."""
        found: dict[int, Tensor] = {}
        for group in groups:
            rows = [
                row for row in lone_rows(self.losses(), group) if any(g is not None for g in row)
            ]
            matrix = jacobian(rows, group, range(len(group)))
            direction = aggregate(matrix, rule).direction * scaled(rule, len(rows))
            pieces = direction.split([p.numel() for p in group])
            found |= {id(p): d.view_as(p) for p, d in zip(group, pieces, strict=True)}
        return [found[id(p)] for p in (self.stem, self.left, self.right)]


@RULES
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_every_tensor_by_itself(rule: str, engine: str) -> None:
    net = Partly()
    wrapped(net.params, rule, groups="tensor", engine=engine).backward(net.losses())
    wanted = net.expected(rule, [[net.stem], [net.left], [net.right]])
    assert_same(grads([net.stem, net.left, net.right]), wanted, 1e-8)
    rows = lone_rows(net.losses(), net.own)
    assert_same(grads(net.own), [rows[k][k] for k in range(3)])


@RULES
@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_named_groups_and_the_rest(rule: str, engine: str) -> None:
    net = Partly()
    groups = {"first": [net.stem, net.left]}
    optimizer = wrapped(net.params, rule, groups=groups, engine=engine)
    optimizer.backward(net.losses())
    wanted = net.expected(rule, [[net.stem, net.left], [net.right]])
    assert_same(grads([net.stem, net.left, net.right]), wanted, 1e-8)
    assert optimizer.last is not None
    assert {k: len(v) for k, v in optimizer.last.grams.items()} == {"first": 3, "other": 2}


def test_one_named_group_of_all_is_the_model() -> None:
    model, whole = Toy(), Toy()
    wrapped(model, "mgda", groups={"all": model}).backward(model.losses())
    wrapped(whole, "mgda").backward(whole.losses())
    assert_same(grads(model), grads(whole), 1e-12)


def test_each_group_has_state_of_its_own() -> None:
    model = Toy()
    optimizer = wrapped(model, "gradvac", groups={"low": model.trunk[0], "high": model.trunk[2]})
    for batch in range(3):
        optimizer.step(model.losses(batch))
    groups = optimizer.core.contents()["state"]["groups"]
    assert set(groups) == {"low", "high"}
    assert not torch.equal(groups["low"]["target"], groups["high"]["target"])


def test_state_of_a_group_that_an_absent_task_reaches_stays() -> None:
    net = Partly()
    optimizer = wrapped(net.params, "gradvac", groups="tensor")
    names = ("a", "b", "c")
    for batch in range(2):
        optimizer.step(dict(zip(names, net.losses(batch), strict=True)))
    before = frozen_copy(optimizer.core.contents()["state"]["groups"])
    a, b, _ = net.losses(2)
    optimizer.step({"a": a, "b": b})
    after = frozen_copy(optimizer.core.contents()["state"]["groups"])
    groups = list(before)
    changed = [g for g in groups if before[g] != after[g]]
    # left joins a and b; stem joins all; in right only b is left, which meets nobody
    assert len(groups) == 3
    assert len(changed) == 2


@pytest.mark.parametrize("rule", ["upgrad", "gradvac", "graddrop"])
@pytest.mark.parametrize("groups", ["tensor", "named"])
def test_groups_that_no_present_task_reaches(rule: str, groups: str) -> None:
    net = Partly()
    chosen: Any = "tensor" if groups == "tensor" else {"stem": net.stem, "left": net.left}
    optimizer = wrapped(net.params, rule, groups=chosen, lr=0.0)
    optimizer.step(dict(zip("abc", net.losses(), strict=True)))
    before = frozen_copy(optimizer.core.contents()["state"]["groups"])
    optimizer.step({"c": net.losses()[2]})
    row = lone_rows(net.losses()[2:], net.params)[0]
    assert net.left.grad is None
    assert_same(grads(net.params), row)
    after = frozen_copy(optimizer.core.contents()["state"]["groups"])
    assert {name: after[name] for name in before} == before


def test_elementwise_rules_take_groups() -> None:
    """A draw per entry does not depend on how parameters are grouped."""
    found = []
    for groups in ("model", "tensor"):
        model = Toy()
        wrapped(model, "graddrop", groups=groups).backward(model.losses())
        found.append(grads(model))
    assert_same(found[1], found[0], 1e-14)


@RULES
def test_gram_matrices_of_tensors_add_up_to_that_of_the_model(rule: str) -> None:
    model = Toy()
    parts, whole = wrapped(model, rule, groups="tensor"), wrapped(model, rule)
    parts.backward(model.losses())
    whole.backward(model.losses())
    assert parts.last is not None
    assert whole.last is not None
    assert_same([sum(parts.last.grams.values())], [whole.last.grams["model"]], 1e-12)
    assert len(parts.last.grams) == 4


@pytest.mark.parametrize("groups", ["tensor", {"a": 0}])
def test_metrics_with_several_groups(groups: Any) -> None:
    model = Toy()
    chosen = groups if groups == "tensor" else {"a": model.trunk[0]}
    optimizer = wrapped(model, "mgda", groups=chosen)
    optimizer.step(model.losses())
    metrics = optimizer.metrics()
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    assert {"gradbal/loss/0", "gradbal/loss/1", "gradbal/loss/2"} <= set(metrics)
