"""The step depends on the mathematics, not on how outputs and losses are packed."""

import logging
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import torch
from models import Toy, assert_same, data, grads, wrapped
from torch import Tensor

Parts = list[Tensor]
K = 2  # outputs of each head


def by_index(parts: Parts) -> Tensor:
    whole = parts[0].new_zeros(len(parts[0]), K * len(parts))
    for i, part in enumerate(parts):
        whole[:, K * i : K * i + K] = part
    return whole


def by_index_put(parts: Parts) -> Tensor:
    whole = parts[0].new_zeros(len(parts[0]), K * len(parts))
    for i, part in enumerate(parts):
        whole = whole.index_put((torch.arange(len(part))[:, None], columns(i)), part)
    return whole


def columns(i: int) -> Tensor:
    return torch.arange(K * i, K * i + K)


# From the parts to one tensor [batch, K * m], and back.
PACK: dict[str, Callable[[Parts], Tensor]] = {
    "cat": lambda parts: torch.cat(parts, dim=1),
    "stack": lambda parts: torch.stack(parts, dim=1).flatten(1),
    "stack, other axis": lambda parts: (
        torch.stack(parts).transpose(0, 1).reshape(len(parts[0]), -1)
    ),
    "nested": lambda parts: torch.cat([parts[0], torch.cat(parts[1:], dim=1)], dim=1),
    "index assignment": by_index,
    "index_put": by_index_put,
}
THROUGH: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda y: y,
    "tanh": torch.tanh,
    "times a constant": lambda y: y * torch.linspace(1, 2, y.shape[1], dtype=y.dtype),
    "plus a constant": lambda y: y + 1,
    "twice flipped": lambda y: y.flip(1).sigmoid().flip(1),
    "permuted": lambda y: y.T.contiguous().exp().T,
    "other dtype": lambda y: y.float().double(),
    "in place": lambda y: y.clone().mul_(2).add_(1),
}
UNPACK: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice": lambda y, i: y[:, K * i : K * i + K],
    "split": lambda y, i: y.split(K, dim=1)[i],
    "split sizes": lambda y, i: y.split([K] * (y.shape[1] // K), dim=1)[i],
    "chunk": lambda y, i: y.chunk(y.shape[1] // K, dim=1)[i],
    "unbind": lambda y, i: y.view(len(y), -1, K).unbind(1)[i],
    "select": lambda y, i: y.view(len(y), -1, K)[:, i],
    "index": lambda y, i: y[:, columns(i)],
    "index_select": lambda y, i: y.index_select(1, columns(i)),
    "gather": lambda y, i: y.gather(1, columns(i).expand(len(y), K)),
    "mask": lambda y, i: (y * mask(y, i)).view(len(y), -1, K).sum(1),
    "where": lambda y, i: y.where(mask(y, i).bool(), 0.0).view(len(y), -1, K).sum(1),
}


def mask(y: Tensor, i: int) -> Tensor:
    return torch.zeros(y.shape[1], dtype=y.dtype).index_fill(0, columns(i), 1)


LOSSES: dict[str, Callable[[Parts], Parts | Tensor]] = {
    "list": lambda losses: losses,
    "stack": torch.stack,
    "cat": lambda losses: torch.cat([loss.view(1) for loss in losses]),
    "weights * stack": lambda losses: torch.tensor([1.0, 2.0, 3.0]).double() * torch.stack(losses),
    "index": lambda losses: filled(losses),
    "index, scaled in place": lambda losses: filled(losses, scale=True),
    "pieces of a sum over samples": lambda losses: torch.stack(losses).expand(4, -1).mean(0),
}


def filled(losses: Parts, scale: bool = False) -> Tensor:
    whole = torch.zeros(len(losses), dtype=losses[0].dtype)
    for i, loss in enumerate(losses):
        whole[i] = loss
    if scale:
        whole[1] *= 2.0
    return whole


def separate(parts: Parts, through: Callable[[Tensor], Tensor]) -> Parts:
    """Apply an entrywise operation to the joined parts one by one."""
    found = []
    for i, part in enumerate(parts):
        whole = part.detach().new_zeros(len(part), K * len(parts))
        whole = torch.cat([part if j == i else whole[:, :K] for j in range(len(parts))], dim=1)
        found.append(through(whole)[:, K * i : K * i + K])
    return found


def gradients(
    rule: str, engine: str, outputs: Callable[[Toy], Parts], packed: Callable[..., Parts | Tensor]
) -> list[Tensor | None]:
    model = Toy()
    optimizer = wrapped(model, rule, engine=engine)
    losses = [(y - i).square().mean() * (i + 1) for i, y in enumerate(outputs(model))]
    optimizer.backward(packed(losses))
    return grads(model)


def check(rule: str, engine: str, pack: str, through: str, unpack: str) -> None:
    def joined(model: Toy) -> Parts:
        y = THROUGH[through](PACK[pack](model(data(6, 4))))
        return [UNPACK[unpack](y, i) for i in range(3)]

    alone = gradients(rule, engine, lambda m: separate(m(data(6, 4)), THROUGH[through]), list)
    assert_same(gradients(rule, engine, joined, list), alone, 1e-9)


@pytest.mark.parametrize("unpack", UNPACK)
@pytest.mark.parametrize("pack", PACK)
def test_packed_outputs(pack: str, unpack: str) -> None:
    choose = Random(f"{pack} {unpack}").choice
    check(choose(["upgrad", "mgda", "graddrop"]), "auto", pack, "nothing", unpack)
    check("config", choose(["batched", "factored", "sequential"]), pack, "tanh", unpack)


@pytest.mark.parametrize("through", THROUGH)
def test_operations_on_packed_outputs(through: str) -> None:
    check("mgda", "sequential", "cat", through, "slice")
    check("upgrad", "streaming", "stack", through, "unbind")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["sequential", "batched", "factored", "streaming"])
@pytest.mark.parametrize("through", THROUGH)
@pytest.mark.parametrize("unpack", UNPACK)
@pytest.mark.parametrize("pack", PACK)
def test_all_packings(pack: str, unpack: str, through: str, engine: str) -> None:
    check("mgda", engine, pack, through, unpack)


@pytest.mark.parametrize("form", LOSSES)
@pytest.mark.parametrize("rule", ["upgrad", "config"])
def test_packed_losses(rule: str, form: str) -> None:
    factors = {"weights * stack": [1, 2, 3], "index, scaled in place": [1, 2, 1]}
    factor = factors.get(form, [1, 1, 1])
    outputs = partial(Toy.__call__, x=data(6, 4))
    alone = gradients(
        rule, "auto", outputs, lambda losses: [f * x for f, x in zip(factor, losses, strict=True)]
    )
    assert_same(gradients(rule, "auto", outputs, LOSSES[form]), alone, 1e-9)


def test_what_is_really_mixed_stays_shared_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    y = torch.cat(model(data(6, 4)), dim=1).cumsum(dim=1)
    with caplog.at_level(logging.WARNING, logger="gradbal"):
        optimizer.step([y[:, K * i : K * i + K].square().mean() for i in range(3)])
    assert "one operation makes (CumsumBackward0)" in caplog.text
    heads = set(map(id, model.heads.parameters()))
    assert heads <= set(map(id, optimizer.shared_parameters()))


def test_a_loss_within_another_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(2)
    optimizer = wrapped(model, "upgrad")
    a, b = model.losses()
    with caplog.at_level(logging.WARNING, logger="gradbal"):
        optimizer.step({"a": a, "b": b, "total": a + b})
    assert "loss of task 'a' is a part of that of 'total'" in caplog.text
    assert "One compiled graph" not in caplog.text
