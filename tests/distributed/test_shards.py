"""What FSDP2 offers beside plain shards."""

from typing import Any

import pytest
import torch
from distributed.pool import Pool
from distributed.training import Net, batch, losses_of, part_of, place, shard, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from gradbal import MTLOptimizer, aggregate

OPTIONS: dict[str, dict[str, Any]] = {
    "mixed": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "half": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept": {"reshard": False},
}


def step(options: str, engine: str) -> dict[str, Any]:
    """Take a step, and work out by lone passes what it should have been."""
    model = Net(pair=False)
    shard(model, init_device_mesh("cpu", (place()[1],)), **OPTIONS[options])
    params = list(model.parameters())
    opt = MTLOptimizer(torch.optim.SGD(params, lr=0.1), "mgda", engine=engine)
    data = part_of(batch(0, 16, torch.float32))

    def losses() -> dict[str, Tensor]:
        return losses_of(model(data["x"], data["i"]), data)

    rows = []
    for loss in losses().values():
        loss.backward(retain_graph=True)
        rows.append([None if p.grad is None else whole(p.grad) for p in params])
        for param in params:
            param.grad = None
    shared = [i for i in range(len(params)) if sum(row[i] is not None for row in rows) > 1]
    jac = torch.stack([torch.cat([row[i].flatten() for i in shared]) for row in rows])
    weights = aggregate(jac.double(), "mgda").weights * len(rows)
    opt.backward(losses())
    grads = [None if p.grad is None else whole(p.grad) for p in params]
    used = opt.last.weights if opt.last else None
    expected = [
        sum(w * row[i] for w, row in zip(used if used is not None else (), rows, strict=True))
        if i in shared
        else next((row[i] for row in rows if row[i] is not None), None)
        for i in range(len(params))
    ]
    opt.step()
    return {"weights": (used, weights), "grads": (grads, expected)}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("engine", ["auto", "representation"])
def test_direction_is_the_combination_of_lone_passes(options: str, engine: str, two: Pool) -> None:
    low = options in ("mixed", "half")
    for found in two(step, options, engine):
        ours, theirs = found["weights"]
        if engine == "auto":
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for grad, expected in zip(*found["grads"], strict=True):
            assert (grad is None) == (expected is None)
            if grad is not None:  # sums in another order, in half precision
                size = float(expected.abs().max())
                off = 2e-2 if low and engine == "representation" else 1e-5
                torch.testing.assert_close(grad, expected.to(grad), rtol=0, atol=off * size)
