"""The same step made by different hands: this package's engines, TorchJD, LibMTL's way."""

import copy
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from benchmarks.models import SharedTrunk
from gradbal import aggregate
from gradbal.lab.bench.measure import Step, complaint
from gradbal.lab.bench.report import INEXACT, SUMMED
from gradbal.lab.bench.steps import balanced_step, summed_step

Build = Callable[[SharedTrunk], Step]

EW = "ew"
PEERS = ("torchjd", "torchjd 1 by 1")  # its default mode, and the other
VECTOR = "flat vector"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def optimizer_of(model: SharedTrunk) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def summed(model: SharedTrunk) -> Step:
    return summed_step(optimizer_of(model), model.losses)


def balanced(model: SharedTrunk, rule: str, engine: str) -> Step:
    return balanced_step(optimizer_of(model), model.losses, rule, engine=engine, scale="native")


def torchjd(model: SharedTrunk, chunk_size: int | None) -> Step:
    """Step as TorchJD's guide to multi-task learning has it."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    optimizer, aggregator = optimizer_of(model), UPGrad()

    def step() -> None:
        features = model.features()
        losses = model.losses_of(features)
        optimizer.zero_grad()
        mtl_backward(losses, features=features, parallel_chunk_size=chunk_size)
        jac_to_grad(model.trunk.parameters(), aggregator)
        optimizer.step()

    return step


def flat_vector(model: SharedTrunk) -> Step:
    """Go backward once per loss, as LibMTL does, and copy what the trunk got into a row.

    LibMTL has no UPGrad, so weights and their sum are ours: only the handling of gradients differs.
    """
    optimizer, shared = optimizer_of(model), list(model.trunk.parameters())
    n_entries = sum(param.numel() for param in shared)

    def step() -> None:
        losses = model.losses()
        optimizer.zero_grad()
        rows = torch.zeros(len(losses), n_entries, device=losses[0].device, dtype=losses[0].dtype)
        for row, loss in zip(rows, losses, strict=True):
            torch.autograd.backward(loss, retain_graph=loss is not losses[-1])
            grads = gradients(shared)
            torch._foreach_copy_(pieces_of(row, grads), grads)
            torch._foreach_zero_(grads)
        direction = aggregate(rows, "upgrad").direction
        torch._foreach_copy_(grads, pieces_of(direction, grads))
        optimizer.step()

    return step


def gradients(params: Iterable[Tensor]) -> list[Tensor]:
    return [param.grad for param in params if param.grad is not None]


def pieces_of(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """Cut a vector into views of these shapes."""
    like = list(like)
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, like, strict=True)]


def contestants(engines: Iterable[str]) -> dict[str, Build]:
    """Return all that are compared; all but the summed loss and `ew` apply UPGrad."""
    return {
        SUMMED: summed,
        EW: partial(balanced, rule="ew", engine="auto"),
        **{engine: partial(balanced, rule="upgrad", engine=engine) for engine in engines},
        PEERS[0]: partial(torchjd, chunk_size=None),
        PEERS[1]: partial(torchjd, chunk_size=1),
        VECTOR: flat_vector,
    }


def makers(model: SharedTrunk, builds: dict[str, Build]) -> dict[str, Callable[[], Step]]:
    """Give each its own copy of the model, once it is built."""

    def maker(build: Build) -> Callable[[], Step]:
        return lambda: build(copy.deepcopy(model))

    return {name: maker(build) for name, build in builds.items()}


def check(
    builds: dict[str, Build], model: SharedTrunk, tolerance: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Compare the gradients that everyone steps with: equal ones make equal parameters.

    Parameters themselves say little after a step of Adam, which turns rounding where a gradient
    is next to zero into a step of full length.

    Args:
        builds: Who is compared: `ew` with the summed loss, other exact ones with the flat vector.
        model: Where all begin.
        tolerance: Largest accepted difference, relative to the norm of the whole gradient.

    Returns:
        The difference of each, and for each that raised an error or differs too much why.
    """
    references = {EW: gradient(summed, model)}
    usual = gradient(flat_vector, model)
    differences, complaints = {}, {}
    for name, build in builds.items():
        if name in (SUMMED, *INEXACT):
            continue
        wanted = references.get(name, usual)
        try:
            found = gradient(build, model)
        except Exception as error:
            complaints[name] = complaint(error)
            continue
        differences[name] = ((found - wanted).norm() / wanted.norm()).item()
        if not differences[name] <= tolerance:
            complaints[name] = f"its gradient differs by {differences[name]:.0e}"
    return differences, complaints


def gradient(build: Build, model: SharedTrunk) -> Tensor:
    """Return all gradients that the first step uses, as one vector."""
    own = copy.deepcopy(model)
    build(own)()
    return torch.cat([grad.double().flatten() for grad in gradients(own.parameters())])
