"""Checkpoints that go on with another number of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from distributed.pool import Pool, Pools
from distributed.training import Net, batch, losses_of, part_of, spread_out, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from gradbal import MTLOptimizer

HALF = 3  # steps before the checkpoint, and after it


def run(
    how: str, rule: str, path: str, first: int, last: int, load: bool = False
) -> tuple[list[Tensor], Any]:
    """Train from one step to another, from the checkpoint or to it."""
    torch.manual_seed(0)
    model = Net().double()
    call = spread_out(model, how)
    params = [p for name, p in model.named_parameters() if "unused" not in name]  # torch's wish
    opt = MTLOptimizer(torch.optim.Adam(params, lr=0.01), rule, tasks=["a", "b", "c"])

    def parts() -> dict[str, Any]:
        optim = get_optimizer_state_dict(model, opt)
        return {"model": get_model_state_dict(model), "optim": optim, "balancer": opt.core}

    if load:
        state = parts()
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, opt, state["optim"])
    for step in range(first, last):
        data = part_of(batch(step, 16, torch.float64), how=how)
        opt.step(losses_of(call(data["x"], data["i"]), data))
    if path and not load:
        dcp.save(parts(), checkpoint_id=path)
    last_record = opt.last
    assert last_record is not None
    return [whole(param) for param in params], last_record.weights


@pytest.mark.filterwarnings("ignore")  # torch's own, about the number of processes
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2), (2, 1)])
@pytest.mark.parametrize(
    ("how", "rule"),
    [("ddp", "famo"), ("ddp", "moco"), ("fsdp", "nash_mtl"), ("fsdp", "moco"), ("tp", "m_config")],
)
def test_resume_with_another_number_of_processes(
    how: str, rule: str, before: int, after: int, pools: Pools, tmp_path: Path
) -> None:
    path = str(tmp_path / "checkpoint")
    expected, weights = run(how, rule, "", 0, 2 * HALF)
    pools[before](run, how, rule, path, 0, HALF)
    if after == 1:
        found = [run(how, rule, path, HALF, 2 * HALF, load=True)]
    else:
        found = pools[after](run, how, rule, path, HALF, 2 * HALF, load=True)
    for params, last in found:
        for ours, theirs in zip(params, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        if weights is not None:
            torch.testing.assert_close(last, weights, rtol=1e-8, atol=1e-10)


def saved_in_the_middle() -> str:
    model = Net().double()
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1))
    data = part_of(batch(0, 16, torch.float64))
    opt.backward(losses_of(model(data["x"], data["i"]), data), accumulate=True)
    try:
        opt.state_dict()
    except RuntimeError as error:
        return str(error)
    return ""


def test_what_each_process_has_put_aside_is_not_saved_as_if_it_were_all(two: Pool) -> None:
    for message in two(saved_in_the_middle):
        assert message == (
            "Checkpoint: gradients were put aside with `accumulate`, and each process has its own; "
            "save after the step that uses them, or call `discard()` first."
        )
