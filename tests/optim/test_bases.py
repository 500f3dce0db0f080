"""Every optimizer of torch as a base: wrapped with equal weights, and plain."""

import copy
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import Toy, assert_same, frozen_copy, grads, square, wrapped
from torch import Tensor, nn, optim

from gradbal import MTLOptimizer

Make = Callable[[Any], torch.optim.Optimizer]
BASES: dict[str, Make] = {
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, lr=0.5),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05),
    "Adam": lambda p: optim.Adam(p, lr=0.01),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01),
    "Adamax": lambda p: optim.Adamax(p, lr=0.01),
    "ASGD": lambda p: optim.ASGD(p, lr=0.05),
    "NAdam": lambda p: optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: optim.RAdam(p, lr=0.01),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Rprop": lambda p: optim.Rprop(p, lr=0.01),
    "SGD": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
}
if hasattr(optim, "Muon"):  # from torch 2.9 on
    BASES["Muon"] = lambda p: optim.Muon([q for q in p if q.ndim == 2], lr=0.02)
WAYS: dict[str, Make] = {
    **{
        f"{kind.__name__} {way}": lambda p, kind=kind, way=way: kind(p, lr=0.01, **{way: True})
        for kind in (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad)
        for way in ("foreach", "fused", "maximize")
    },
    "Adam with tensors": lambda p: optim.Adam(p, lr=torch.tensor(0.01), betas=(0.8, 0.99)),
}
ELSEWHERE = {"SparseAdam", "LBFGS"}  # below; in step/test_plain.py


def test_no_optimizer_is_left_out() -> None:
    kinds = {
        name
        for name in optim.__all__
        if isinstance(kind := getattr(optim, name), type) and issubclass(kind, optim.Optimizer)
    }
    assert kinds - {"Optimizer"} == set(BASES) | ELSEWHERE


@pytest.mark.parametrize("make", [*BASES.values(), *WAYS.values()], ids=[*BASES, *WAYS])
def test_equal_weights_are_plain_training(make: Make) -> None:
    plain, ours = Toy(), Toy()
    optimizer, mtl = make(plain.parameters()), MTLOptimizer(make(ours.parameters()), "ew")
    for batch in range(4):
        optimizer.zero_grad()
        sum(plain.losses(batch)).backward()
        optimizer.step()
        mtl.step(ours.losses(batch))
        assert_same(ours.parameters(), plain.parameters(), 0)
    ours_state, state = mtl.state_dict(), optimizer.state_dict()
    assert frozen_copy(ours_state["state"]) == frozen_copy(state["state"])
    assert ours_state["param_groups"] == state["param_groups"]


@pytest.mark.parametrize("make", [*BASES.values(), *WAYS.values()], ids=[*BASES, *WAYS])
def test_a_rule_gives_its_gradient_to_the_base(make: Make) -> None:
    """The base steps on what ``backward`` wrote, and on nothing else."""
    plain, ours = Toy(), Toy()
    optimizer, mtl = make(plain.parameters()), MTLOptimizer(make(ours.parameters()), "upgrad")
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = wrapped(mine, "upgrad", lr=0.0)
    for batch in range(3):
        gradients.step(plain.losses(batch))
        optimizer.step()
        mtl.step(ours.losses(batch))
        assert_same(ours.parameters(), plain.parameters(), 0)


# ---------------------------------------------------------------------- sparse gradients


class Words(nn.Module):
    """An embedding with sparse gradients, a trunk above it, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = nn.Embedding(11, 4, sparse=True).double()
        self.trunk, self.heads = nn.Linear(4, 3).double(), nn.Linear(3, 2).double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))

    def losses(self, batch: int) -> list[Tensor]:
        z = self.trunk(self.table(torch.tensor([1, 5, 5, 2 + batch]))).tanh()
        return [square(y - k) for k, y in enumerate(self.heads(z).unbind(-1))]

    def split(self) -> tuple[list[Tensor], list[Tensor]]:
        return [self.table.weight], [*self.trunk.parameters(), *self.heads.parameters()]


def sparse_and_dense(model: Words) -> list[torch.optim.Optimizer]:
    sparse, dense = model.split()
    return [optim.SparseAdam(sparse, lr=0.05), optim.AdamW(dense, lr=0.01)]


def test_sparse_and_dense_parameters_with_two_optimizers() -> None:
    """What one optimizer cannot do: SparseAdam refuses dense gradients, AdamW sparse ones."""
    plain, ours = Words(), Words()
    optimizers, mtl = sparse_and_dense(plain), MTLOptimizer(sparse_and_dense(ours), "ew")
    for batch in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sum(plain.losses(batch)).backward()
        for optimizer in optimizers:
            optimizer.step()
        mtl.step(ours.losses(batch))
        assert ours.table.weight.grad is not None
        assert ours.table.weight.grad.is_sparse
        assert_same(ours.parameters(), plain.parameters(), 1e-13)


@pytest.mark.parametrize("rule", ["upgrad", "pcgrad", "graddrop"])
def test_sparse_rows_give_the_direction_of_dense_ones(rule: str) -> None:
    model, plain = Words(), Words()
    plain.table.sparse = False
    sparse, dense = model.split()
    ours = MTLOptimizer([optim.SparseAdam(sparse), optim.SGD(dense)], rule, seed=1)
    reference = MTLOptimizer(optim.SGD(plain.parameters()), rule, seed=1)
    for batch in range(3):
        ours.zero_grad()
        ours.backward(model.losses(batch))
        reference.zero_grad()
        reference.backward(plain.losses(batch))
        assert_same(grads(model), grads(plain), 1e-9)
        assert model.table.weight.grad is not None
        assert model.table.weight.grad.is_sparse


# ---------------------------------------------------------------------- over processes


@contextmanager
def alone() -> Iterator[None]:
    """Be a process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's own
def test_zero_redundancy_optimizer() -> None:
    """Its state is gathered before it is saved; what is not ours to know passes through."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when imported

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(model.parameters(), optim.AdamW, lr=0.01)

    plain, ours = Toy(), Toy()
    with alone():
        optimizer, mtl = make(plain), MTLOptimizer(make(ours), "ew")
        for batch in range(3):
            optimizer.zero_grad()
            sum(plain.losses(batch)).backward()
            optimizer.step()
            mtl.step(ours.losses(batch))
        assert_same(ours.parameters(), plain.parameters(), 0)
        mtl.consolidate_state_dict()
        saved = copy.deepcopy(mtl.state_dict())
        again = Toy()
        again.load_state_dict(ours.state_dict())
        other = MTLOptimizer(make(again), "ew")
        other.load_state_dict(saved)
        mtl.step(ours.losses(3))
        other.step(again.losses(3))
        assert_same(again.parameters(), ours.parameters(), 0)
