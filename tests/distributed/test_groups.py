"""Which processes belong together, and what they do in special ways of stepping."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.pool import Pool
from distributed.training import (
    Net,
    batch,
    largest_gap,
    losses_of,
    part_of,
    place,
    tensor_parallel,
    train,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from gradbal import MTLOptimizer
from gradbal.distributed.collectives import Link


def train_natively(**options: Any) -> dict[str, Any]:
    """Train as with a backend whose own reductions are used."""
    patched = pytest.MonkeyPatch()
    patched.setattr(Link, "_at_once", lambda *args: False)
    try:
        return train(**options)
    finally:
        patched.undo()


@pytest.mark.parametrize("rule", ["upgrad", "graddrop", "ew"])
@pytest.mark.parametrize("how", ["plain", "fsdp"])
def test_the_backend_s_own_reductions_do_as_well(how: str, rule: str, two: Pool) -> None:
    alone = train(rule, how=how)
    for one in two(train_natively, rule=rule, how=how):
        assert largest_gap(alone, one) < 1e-10


def train_in_pairs(rule: str) -> dict[str, Any]:
    rank, _ = place()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = Net().double()
    opt = MTLOptimizer(
        torch.optim.SGD(list(model.parameters()), lr=0.1), rule, process_group=pairs[rank // 2]
    )
    data = batch(rank // 2, 16, torch.float64)
    half = {name: tensor[8 * (rank % 2) : 8 * (rank % 2) + 8] for name, tensor in data.items()}
    opt.step(losses_of(model(half["x"], half["i"]), half))
    alone = Net().double()
    other = MTLOptimizer(
        torch.optim.SGD(list(alone.parameters()), lr=0.1), rule, process_group=None
    )
    other.step(losses_of(alone(data["x"], data["i"]), data))
    pairs_of = zip(model.parameters(), alone.parameters(), strict=True)
    return {"gap": max(float((a - b).detach().abs().max()) for a, b in pairs_of)}


@pytest.mark.parametrize("rule", ["upgrad", "uw"])
def test_groups_balance_by_themselves_and_processes_can_alone(rule: str, four: Pool) -> None:
    assert all(found["gap"] < 1e-12 for found in four(train_in_pairs, rule))


def stranger() -> str:
    rank, _ = place()
    group = dist.new_group([0])
    model = Net().double()
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1), process_group=group)
    data = batch(0, 4, torch.float64)
    try:
        opt.step(losses_of(model(data["x"], data["i"]), data))
    except ValueError as error:
        return str(error)
    return f"process {rank} could"


def test_a_process_outside_of_its_group_is_told(two: Pool) -> None:
    first, second = two(stranger)
    assert first == "process 0 could"
    assert second == (
        "MTLOptimizer: process 1 is no member of `process_group`; build the optimizer with a group "
        "that it belongs to."
    )


def special(kind: str, rule: str) -> dict[str, Any]:
    """Train with a scaler, an optimizer that evaluates losses again, or without synchronisation."""
    rank, size = place()
    model = Net().double()
    call: Any = model if size == 1 else DistributedDataParallel(model, find_unused_parameters=True)
    params = [p for name, p in model.named_parameters() if "unused" not in name]
    if kind == "lbfgs":
        base: torch.optim.Optimizer = torch.optim.LBFGS(params, lr=0.1, max_iter=4)
    else:
        base = torch.optim.SGD(params, lr=0.1)
    opt = MTLOptimizer(base, rule)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=kind == "scaler")
    for step in range(3):
        data = part_of(batch(step, 16, torch.float64))
        if kind == "scaler" and step == 1 and rank == size - 1:
            data["y"] = data["y"] * torch.inf

        def closure(data: Any = data) -> Any:
            return losses_of(call(data["x"], data["i"]), data)

        if kind == "lbfgs":
            opt.step(closure)
        elif kind == "scaler":
            opt.zero_grad()
            opt.backward(closure(), scaler=scaler)
            scaler.step(opt)
            scaler.update()
        elif kind == "no_sync":
            opt.zero_grad()
            if size == 1:
                opt.backward(closure())
            else:
                with call.no_sync():
                    opt.backward(closure())
            opt.backward(closure())
            opt.step()
        else:  # losses after the step, from a closure
            opt.step(closure(), closure=closure)
    last = opt.last
    assert last is not None
    return {
        "parameters": [param.detach() for param in params],
        "weights": None if last.weights is None else last.weights,
        "losses": None,
        "scale": scaler.get_scale(),
    }


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("scaler", "upgrad"),
        ("scaler", "ew"),
        ("scaler", "graddrop"),
        ("lbfgs", "mgda"),
        ("lbfgs", "ew"),
        ("no_sync", "ew"),
        ("no_sync", "upgrad"),
        ("closure", "famo"),
    ],
)
def test_special_ways_of_stepping(kind: str, rule: str, two: Pool) -> None:
    alone = special(kind, rule)
    for one in two(special, kind, rule):
        assert largest_gap(alone, one) < 1e-9
        assert one["scale"] == alone["scale"]


def refused(what: str) -> str:
    model = Net().double()
    rank, _ = place()
    data = part_of(batch(0, 16, torch.float64))
    options: dict[str, Any] = {
        "capturable": {"capturable": True},
        "probes": {"rule": "moml"},
        "looks": {"rule": "graddrop", "engine": "representation"},
        "static": {},
        "counts": {},
        "uneven": {"engine": "representation"},
    }[what]
    call: Any = model
    if what == "static":
        call = DistributedDataParallel(model, static_graph=True)
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1), **options)
    losses = losses_of(call(data["x"], data["i"]), data)
    more = [lambda: losses] if what == "probes" else []
    if what == "uneven" and rank:
        del losses["a"]
    try:
        opt.step(losses, *more, counts=[8, 8, 8] if what == "counts" and rank else None)
    except (ValueError, RuntimeError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("capturable", "with several processes numbers must be read back"),
        ("probes", "MOML looks at the losses at other parameters, which several processes"),
        ("looks", "GradDrop looks at single entries, and at a representation every process"),
        ("static", "DistributedDataParallel(static_graph=True) counts on one and the same"),
        ("counts", "`counts` was given in some processes only"),
        ("uneven", "Representation: the processes have losses of different tasks"),
    ],
)
def test_what_cannot_be_is_said_in_all_processes(what: str, words: str, two: Pool) -> None:
    for message in two(refused, what):
        assert words in message, message


def split_over_some(rule: str) -> str:
    model = Net().double()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, mesh["tensor"])
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1), rule)
    data = part_of(batch(0, 16, torch.float64), how="fsdp_tp")
    try:
        opt.step(losses_of(model(data["x"], data["i"]), data))
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("rule", ["ew", "upgrad"])
def test_parameters_split_over_some_processes_need_shards_over_the_others(
    rule: str, four: Pool
) -> None:
    for message in four(split_over_some, rule):
        assert "tensor parallelism splits parameters over 2 of the 4 processes" in message
