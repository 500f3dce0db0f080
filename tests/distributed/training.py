"""Small trainings that a process does alone on the whole batch, or several on parts of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from gradbal import MTLOptimizer
from gradbal.jacobian.engines import Representation

N_TASKS = 3


class Net(nn.Module):
    """A trunk wide enough for rows to travel in parts, a private layer per task, one for two."""

    def __init__(self, *, width: int = 96, sparse: bool = False, pair: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Embedding(11, 6, sparse=sparse)
        self.trunk = nn.Sequential(
            nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width * 2), nn.Tanh()
        )
        self.norm = nn.LayerNorm(width * 2)
        self.pair = nn.Linear(width * 2, 4) if pair else None
        sizes = [4 if pair and k < 2 else width * 2 for k in range(N_TASKS)]
        self.heads = nn.ModuleList(nn.Linear(size, 1) for size in sizes)
        self.unused = nn.Linear(2, 2)
        with torch.no_grad():
            for param in self.parameters():
                draw = torch.randn(param.shape, generator=generator, dtype=torch.float64)
                param.copy_(draw / max(1.0, param.shape[-1] ** 0.5))

    def forward(self, x: Tensor, i: Tensor) -> dict[str, Tensor]:
        z = self.norm(self.trunk(torch.cat([x, self.embed(i)], dim=1)))
        pair = z if self.pair is None else self.pair(z).tanh()
        return {"abc"[k]: head(z if k == 2 else pair) for k, head in enumerate(self.heads)}


def batch(step: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the inputs and targets of a step, for all processes together."""
    generator = torch.Generator().manual_seed(100 + step)
    draw = torch.randn(size, 2 + N_TASKS, generator=generator, dtype=torch.float64)
    index = torch.randint(11, (size,), generator=generator)
    return {"x": draw[:, :2].to(dtype), "i": index, "y": draw[:, 2:].to(dtype)}


def losses_of(outputs: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean losses over these samples; NaN targets are missing."""
    found = {}
    for k, (name, y) in enumerate(outputs.items()):
        target = part["y"][:, k]
        known = ~target.isnan()
        if known.any():
            factor = [1.0, 4.0, 0.3][k]
            found[name] = factor * (y[known, 0] - target[known]).square().mean()
    return found


def place() -> tuple[int, int]:
    """Return the rank and size of the group, or those of a process alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part_of(
    whole: Mapping[str, Tensor], ends: list[int] | None = None, how: str = "ddp"
) -> dict[str, Tensor]:
    """Return this process' samples: equally many in each, or up to these ends."""
    rank, size = place()
    n = len(whole["x"])
    if how == "tp":
        return dict(whole)
    if how == "fsdp_tp":
        rank, size = rank // 2, max(1, size // 2)
    if size == 1:
        return dict(whole)
    ends = ends or [n * (i + 1) // size for i in range(size)]
    start = ends[rank - 1] if rank else 0
    return {name: tensor[start : ends[rank]] for name, tensor in whole.items()}


def spread_out(model: nn.Module, how: str) -> Callable[..., Any]:
    """Return what to call instead of the model."""
    if place()[1] == 1 or how == "plain":
        return model
    if how == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=True)
    size = place()[1]
    if how == "tp":
        tensor_parallel(model, init_device_mesh("cpu", (size,)))
    elif how == "fsdp_tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "tensor"))
        tensor_parallel(model, mesh["tensor"])
        shard(model, mesh["data"])
    else:
        shard(model, init_device_mesh("cpu", (size,)), reshard=how != "fsdp_kept")
    return model


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Split the trunk's layers over the processes of a mesh."""
    parallelize_module(model.trunk, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def shard(model: nn.Module, mesh: DeviceMesh, *, reshard: bool = True, **options: Any) -> None:
    """Shard the trunk, the heads and the rest, each by itself."""
    for part in (model.trunk, *model.heads, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard, **options)


def whole(param: Tensor) -> Tensor:
    """Return all of a parameter, in every process."""
    full = param.full_tensor() if hasattr(param, "full_tensor") else param
    return full.detach().clone()


def train(
    rule: Any = "upgrad",
    engine: Any = "sequential",
    *,
    how: str = "ddp",
    dtype: torch.dtype = torch.float64,
    steps: int = 3,
    n: int = 16,
    lr: float = 0.1,
    sparse: bool = False,
    pair: bool = True,
    ends: list[int] | None = None,
    missing: tuple[tuple[str, int], ...] = (),
    counts: bool = False,
    pieces: int = 1,
    named: bool = False,
    aux: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train for some steps and return what came of it.

    Args:
        rule: The rule.
        engine: The engine; ``"named"`` for the representation at the norm.
        how: How the model is spread over processes.
        dtype: Of the parameters.
        steps: How many.
        n: Samples in the whole batch.
        lr: Learning rate.
        sparse: Whether the embedding has sparse gradients.
        pair: Whether two of the tasks share a layer beside the trunk.
        ends: Where each process' samples end; None for equal parts.
        missing: Tasks without labels in the part of a process out of four.
        counts: Whether to give the number of labelled samples.
        pieces: In how many pieces the batch is accumulated.
        aux: Whether there is an auxiliary loss.
        **options: For the optimizer.
    """
    model = Net(sparse=sparse, pair=pair).to(dtype)
    if engine == "named":
        engine = Representation(model.norm)
    call = spread_out(model, how)
    params = list(model.parameters())  # later FSDP may show others
    opt = MTLOptimizer(torch.optim.SGD(params, lr=lr), rule, engine=engine, **options)
    for step in range(steps):
        data = batch(step, n, dtype)
        for name, quarter in missing:
            data["y"][n * quarter // 4 : n * (quarter + 1) // 4, "abc".index(name)] = torch.nan
        mine = part_of(data, ends, how)
        for piece in range(pieces):
            some = {name: t[piece::pieces] for name, t in mine.items()}
            outputs = call(some["x"], some["i"])
            losses = {name: loss / pieces for name, loss in losses_of(outputs, some).items()}
            known = dict(zip("abc", (~some["y"].isnan()).sum(dim=0).tolist(), strict=True))
            opt.backward(
                losses,
                accumulate=piece + 1 < pieces,
                counts={name: known[name] for name in losses} if counts else None,
                aux=outputs["c"].square().mean() if aux else None,
            )
        opt.step()
        opt.zero_grad()
    last = opt.last
    assert last is not None
    order = sorted(range(len(last.tasks)), key=last.tasks.__getitem__)
    return {
        "parameters": [whole(param) for param in params],
        "weights": None if last.weights is None else last.weights[..., order],
        "losses": last.losses[order],
        "grads": [param.grad is not None for param in params],
    }


def largest_gap(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Return the largest relative difference in parameters, weights and losses."""
    pairs = list(zip(one["parameters"], other["parameters"], strict=True))
    for key in ("weights", "losses"):
        if one[key] is not None:
            pairs.append((one[key], other[key]))
    gaps = [(a - b).abs().max() / max(float(a.abs().max()), 1e-3) for a, b in pairs]
    return float(torch.stack(gaps).max())
