"""What an optimizer says about itself beside other processes."""

from typing import Any

import pytest
import torch
from distributed.pool import Pool
from distributed.training import Net, batch, losses_of, part_of, place, spread_out

from gradbal import MTLOptimizer, Recorder
from gradbal.diagnostics.course import Course


def ask(how: str, engine: Any, what: str, ranks: tuple[int, ...]) -> Any:
    """Take a step in all processes, and ask in some of them."""
    model = Net().double()
    call = spread_out(model, how)
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1), engine=engine)

    def losses(step: int) -> dict[str, torch.Tensor]:
        part = part_of(batch(step, 16, torch.float64), how=how)
        return losses_of(call(part["x"], part["i"]), part)

    opt.step(losses(0))
    found = losses(1)
    answer = getattr(opt, what)(found) if place()[0] in ranks else None
    opt.step(losses(2))  # together, as before
    return answer


@pytest.mark.parametrize(
    ("how", "engine"),
    [
        ("ddp", "sequential"),
        ("ddp", "streaming"),
        ("ddp", "representation"),
        ("tp", "sequential"),
        ("fsdp", "sequential"),
    ],
)
def test_a_check_looks_at_each_process_own_part(how: str, engine: str, two: Pool) -> None:
    for found in two(ask, how, engine, "check", (0, 1)):
        assert max(found.values()) < 1e-12


def test_one_process_may_be_asked_alone_what_is_shared(two: Pool) -> None:
    text, nothing = two(ask, "ddp", "sequential", "explain", (0,))
    assert "3 tasks share" in text
    assert nothing is None


def test_what_is_shared_shows_once_steps_were_taken(two: Pool) -> None:
    for text in two(ask, "fsdp", "sequential", "explain", (0, 1)):
        assert "the tasks share 20,710 parameters in 9 tensors." in text
        assert "keeps 3 x 0.1 MiB of task gradients" in text  # half of them each


def record(how: str, pieces: int) -> tuple[Course, str]:
    """Train for three steps and return what a recorder has seen, and its words without times."""
    model = Net().double()
    call = spread_out(model, how)
    opt = MTLOptimizer(torch.optim.SGD(list(model.parameters()), lr=0.1))
    with Recorder(opt) as recorder:
        for step in range(3):
            part = part_of(batch(step, 16, torch.float64), how=how)
            for piece in range(pieces):
                some = {name: tensor[piece::pieces] for name, tensor in part.items()}
                losses = losses_of(call(some["x"], some["i"]), some)
                shares = {name: loss / pieces for name, loss in losses.items()}
                opt.backward(shares, accumulate=piece + 1 < pieces)
            opt.step()
            opt.zero_grad()
    lines = recorder.report().splitlines()
    return recorder.course(), "\n".join(line for line in lines if "ms (median)" not in line)


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp"])
def test_a_recorder_sees_the_whole_batch_in_every_process(how: str, pieces: int, two: Pool) -> None:
    alone, words = record(how, pieces)
    for course, said in two(record, how, pieces):
        assert said == words
        for name in ("losses", "weights", "grams", "slopes"):
            torch.testing.assert_close(
                getattr(course, name), getattr(alone, name), rtol=1e-10, atol=1e-12
            )
