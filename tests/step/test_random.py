"""Runs drawn at random against a slow optimizer that does the same in the obvious way."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import (
    Row,
    assert_same,
    data,
    dense,
    grads,
    jacobian,
    lone_rows,
    param,
    scaled,
    square,
    sum_or_none,
    wrapped,
)
from torch import Tensor
from torch.amp import GradScaler

from gradbal import aggregate, engines

RULES = ["ew", "upgrad", "mgda", "cagrad", "imtl_g", "gls"]
ENGINES: list[Any] = ["sequential", "batched", engines.Batched(chunk_size=2)]


class Net:
    """Layers in a row; every task looks at some of them and has a parameter of its own."""

    def __init__(self, draw: random.Random, n_tasks: int) -> None:
        self.layers = [param(3, 3, seed=draw.randrange(10**6)) for _ in range(4)]
        self.own = [param(3, seed=draw.randrange(10**6)) for _ in range(n_tasks)]
        self.looks = [sorted(draw.sample(range(4), draw.randint(1, 3))) for _ in range(n_tasks)]
        self.skips = draw.random() < 0.5
        self.params = [*self.layers, *self.own]

    def losses(self, batch: int) -> list[Tensor]:
        z, maps = data(4, 3, seed=batch), []
        for layer in self.layers:
            new = (z @ layer).tanh()
            z = z + new if self.skips else new
            maps.append(z)
        return [
            square(sum(maps[i] for i in look) * own - k) + 0.1
            for k, (look, own) in enumerate(zip(self.looks, self.own, strict=True))
        ]


class Slowly:
    """The same by lone passes and one explicit Jacobian."""

    def __init__(self, rule: str, params: Sequence[Tensor], groups: str, heads: str) -> None:
        self.rule, self.params, self.groups, self.heads = rule, params, groups, heads
        self.reached: list[set[int]] = [set() for _ in params]
        self.rows: dict[int, Row] = {}
        self.values: dict[int, float] = {}

    def add(self, losses: dict[int, Tensor]) -> None:
        rows = lone_rows(list(losses.values()), self.params)
        for (task, loss), row in zip(losses.items(), rows, strict=True):
            old = self.rows.get(task, [None] * len(row))
            self.rows[task] = [sum_or_none(pair) for pair in zip(old, row, strict=True)]
            self.values[task] = self.values.get(task, 0.0) + float(loss.detach())
            for reached, grad in zip(self.reached, row, strict=True):
                reached |= {task} if grad is not None else set()

    def solve(self) -> list[Tensor | None]:
        tasks = sorted(self.rows)
        rows = [self.rows[task] for task in tasks]
        shared = [n for n, reached in enumerate(self.reached) if len(reached) > 1]
        here = [n for n in shared if any(row[n] is not None for row in rows)]
        by_loss = self.rule in ("ew", "gls")
        weights = [1.0] * len(tasks)
        if by_loss:
            values = [self.values[task] for task in tasks]
            found = aggregate(torch.eye(len(tasks)).double(), self.rule, losses=values)
            assert found.weights is not None
            weights = found.weights.tolist()
        out: list[Tensor | None] = [None] * len(self.params)
        parts = [here] if self.groups == "model" else [[n] for n in here]
        for part in parts:
            present = [k for k, row in enumerate(rows) if any(row[n] is not None for n in part)]
            if not present:
                continue
            matrix = jacobian([rows[k] for k in present], self.params, part)
            if by_loss:
                chosen = torch.tensor([weights[k] for k in present]).double()
            else:
                solution = aggregate(matrix, self.rule).weights
                assert solution is not None
                chosen = solution * scaled(self.rule, len(present))
                for k, weight in zip(present, chosen.tolist(), strict=True):
                    weights[k] = weight
            pieces = (chosen @ matrix).split([self.params[n].numel() for n in part])
            for n, piece in zip(part, pieces, strict=True):
                out[n] = piece.view(self.params[n].shape)
        plain = self.heads == "plain" or (self.heads == "own" and not by_loss)
        for n in set(range(len(self.params))) - set(shared):
            out[n] = sum_or_none(
                row[n] if row[n] is None or plain else dense(row[n]) * weights[k]
                for k, row in enumerate(rows)
            )
        self.rows, self.values = {}, {}
        return out


@pytest.mark.parametrize("seed", range(60))
def test_a_run_drawn_at_random(seed: int) -> None:
    draw = random.Random(seed)
    n_tasks = draw.randint(1, 5)
    net, rule = Net(draw, n_tasks), draw.choice(RULES)
    groups = "model" if rule in ("ew", "gls") else draw.choice(["model", "tensor"])
    heads = draw.choice(["own", "plain"] if groups == "tensor" else ["own", "plain", "weighted"])
    with_scaler = draw.random() < 0.4
    optimizer = wrapped(
        net.params,
        rule,
        lr=0.02,
        engine=draw.choice(ENGINES),
        groups=groups,
        heads=None if heads == "own" else heads,
        tasks=[f"t{k}" for k in range(n_tasks)],
    )
    slow = Slowly(rule, net.params, groups, heads)
    scaler = GradScaler("cpu", init_scale=2.0**12) if with_scaler else None
    for step in range(6):
        optimizer.zero_grad()
        foreign = draw.random() < 0.2
        if foreign:
            for p in net.params:
                p.grad = torch.ones_like(p)
        pieces = draw.choice([1, 1, 2, 3])
        for piece in range(pieces):
            tasks = sorted(draw.sample(range(n_tasks), draw.randint(1, n_tasks)))
            batch = 1000 * seed + 10 * step + piece
            everyone = net.losses(batch)
            slow.add({k: everyone[k] / pieces for k in tasks})
            everyone = net.losses(batch)
            optimizer.backward(
                {f"t{k}": everyone[k] / pieces for k in tasks},
                accumulate=piece < pieces - 1,
                scaler=scaler,
            )
        wanted = slow.solve()
        if scaler is not None:
            factor = scaler.get_scale()
            wanted = [None if w is None else w * factor for w in wanted]
        if foreign:
            wanted = [
                torch.ones_like(p) if w is None else w + 1
                for p, w in zip(net.params, wanted, strict=True)
            ]
        assert_same(grads(net.params), wanted, 1e-7)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
