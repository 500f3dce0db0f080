"""When a process fails: all stop with an error that names it, or leave the step out together."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed.pool import Pool
from distributed.training import Net, batch, losses_of, part_of, place, spread_out
from torch import Tensor

from gradbal import MTLOptimizer

TIMEOUT = 15  # seconds; a process that waits in vain gives up then


@pytest.fixture(params=[2, 4])
def mortal(request: pytest.FixtureRequest) -> Iterator[Pool]:
    """Processes of the test's own, since not all may survive."""
    pool = Pool(request.param, TIMEOUT)
    yield pool
    pool.close()


def fail(how: str, spread: str = "ddp", rule: str = "upgrad", **options: Any) -> dict[str, Any]:
    """Train three steps, in the second of which process 1 fails."""
    rank, _ = place()
    model = Net().double()
    call = spread_out(model, spread)
    params = list(model.parameters())
    opt = MTLOptimizer(torch.optim.SGD(params, lr=0.1), rule, **options)
    errors, finished = [], []
    for step in range(3):
        data = part_of(batch(step, 16, torch.float64))
        bad = step == 1 and rank == 1
        if bad and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if bad and how == "infinite":
            data["y"] = data["y"] * torch.inf

        def closure(data: Any = data, bad: bool = bad) -> dict[str, Tensor]:
            if bad and how == "raises":
                raise KeyError("sample 17")
            losses = losses_of(call(data["x"], data["i"]), data)
            if bad and how == "misshapen":
                losses["b"] = losses["b"] * torch.ones(2, dtype=torch.float64)
            return losses

        try:
            if how == "raises":
                opt.step(closure)
            else:
                opt.backward(closure(), accumulate=bad and how == "elsewhere")
                opt.step()
            finished.append(step)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            if how == "killed":
                break
        opt.zero_grad()
    found = {"errors": errors, "finished": finished, "skipped": int(opt.core.skipped)}
    return found | {"parameters": [param.detach() for param in params]}


def check_alike(found: list[dict[str, Any]]) -> None:
    for one in found:
        for ours, theirs in zip(one["parameters"], found[0]["parameters"], strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ["upgrad", "ew"])
def test_a_closure_that_raises_breaks_the_step_off_everywhere(rule: str, two: Pool) -> None:
    found = two(fail, "raises", rule=rule)
    assert found[0]["errors"] == [
        "RuntimeError: MTLOptimizer: process 1 failed, so all of them broke off this step; there "
        "it said KeyError: 'sample 17'"
    ]
    assert found[1]["errors"] == ["KeyError: 'sample 17'"]
    assert all(one["finished"] == [0, 2] for one in found)
    check_alike(found)


@pytest.mark.parametrize("rule", ["upgrad", "ew"])
def test_a_loss_that_is_none_is_told_to_all(rule: str, four: Pool) -> None:
    found = four(fail, "misshapen", rule=rule)
    for rank, one in enumerate(found):
        (error,) = one["errors"]
        assert "the loss of task 'b' must be a scalar, got shape [2]" in error
        assert ("process 1 failed" in error) == (rank != 1)
        assert one["finished"] == [0, 2]
    check_alike(found)


@pytest.mark.parametrize("rule", ["upgrad", "ew", "graddrop"])
def test_what_is_not_finite_in_one_process_stops_all(rule: str, two: Pool) -> None:
    found = two(fail, "infinite", rule=rule)
    for one in found:
        (error,) = one["errors"]
        assert "'a', task 'b', task 'c' (in process 1) is not finite; nothing was changed" in error
        assert one["finished"] == [0, 2]
    check_alike(found)


@pytest.mark.parametrize("spread", ["ddp", "plain"])
@pytest.mark.parametrize("rule", ["upgrad", "ew", "graddrop"])
def test_what_is_not_finite_in_one_process_is_skipped_by_all(
    spread: str, rule: str, two: Pool
) -> None:
    found = two(fail, "infinite", spread=spread, rule=rule, on_nonfinite="skip")
    assert all(one["skipped"] == 1 and not one["errors"] for one in found)
    check_alike(found)


def test_processes_that_do_different_things_are_told(two: Pool) -> None:
    for one in two(fail, "elsewhere"):
        assert one["errors"][0] == (
            "RuntimeError: MTLOptimizer: the processes are not at the same point of the training: "
            "process 0 balances losses after 1 solved steps; process 1 puts gradients aside after "
            "1 solved steps; call the optimizer alike in all of them."
        )


@pytest.mark.parametrize("rule", ["upgrad", pytest.param("ew", marks=pytest.mark.slow)])
def test_a_killed_process_is_named_by_the_others(rule: str, mortal: Pool) -> None:
    found = mortal.outcomes(fail, "killed", "plain", rule)
    assert found[1] == (False, None)
    for rank in {*range(len(found))} - {1}:
        ok, one = found[rank]
        assert ok
        assert one["finished"] == [0]
        (error,) = one["errors"]
        assert f"step 2 of {len(found)} processes was broken off in process {rank}" in error
        assert "process 1 is gone" in error or "process was lost" in error


def absent_under_fsdp() -> str:
    rank, _ = place()
    model = Net().double()
    call = spread_out(model, "fsdp")
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1))
    data = part_of(batch(0, 16, torch.float64))
    losses = losses_of(call(data["x"], data["i"]), data)
    if rank == 1:
        del losses["b"]
    try:
        opt.step(losses)
    except RuntimeError as error:
        message = str(error)
    count = {name: float(rank == 0 or name != "b") for name in "abc"}
    opt.step(losses_of(call(data["x"], data["i"]), data), counts=count)
    return message


def test_shards_need_every_loss_everywhere_but_it_may_count_nothing(two: Pool) -> None:
    for message in two(absent_under_fsdp):
        assert message == (
            "MTLOptimizer: process 1 has no loss of a task that others have, and parameters "
            "sharded by fully_shard are gathered and reduced by all processes together; compute "
            "the loss there on any samples, with a count of 0 in `counts`."
        )


def unlike(what: str) -> str:
    rank, _ = place()
    model = Net().double()
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1), "famo")
    data = part_of(batch(0, 16, torch.float64))
    if what == "start" and rank:
        with torch.no_grad():
            model.norm.weight[3] += 1e-9

    def losses() -> dict[str, Tensor]:
        return losses_of(model(data["x"], data["i"]), data)

    try:
        opt.step(losses())
        opt.check(losses())
        if what == "parameter" and rank:
            with torch.no_grad():
                model.norm.weight[3] += 1e-9
        if what == "state" and rank:
            state = opt.core.state["model"]
            state["logits"] = state["logits"] + 1e-9
        if what == "generator" and rank:
            torch.rand(1, generator=opt.core.generator)
        opt.check(losses())
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("start", "the parameters of the 2 processes are no replicas: parameter 5 differs"),
        ("parameter", "check: parameter 5 is not the same in process 1 as in process 0"),
        ("state", "check: 'logits' of the rule (model) is not the same in process 1"),
        ("generator", "check: the random generator is not the same in process 1"),
        ("", ""),
    ],
)
def test_processes_that_are_not_alike_are_found_out(what: str, words: str, two: Pool) -> None:
    assert all(
        message.startswith(f"MTLOptimizer: {words}") or message.startswith(words)
        for message in two(unlike, what)
    )
