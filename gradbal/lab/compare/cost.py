"""What a step takes: time, memory, and how often gradients go through the network."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gradbal.lab.bench.measure import WARMUP, Step, in_turn, peaks
from gradbal.lab.bench.steps import balanced_step, summed_step
from gradbal.lab.compare.settings import Settings
from gradbal.lab.training.loop import OPTIMIZERS, further, new_model, one_thread, some
from gradbal.lab.training.resume import Kept

SECONDS = 2.0  # for a rule and the plain sum together


@dataclass(frozen=True, order=True)
class CostCell:
    """Whose step is measured.

    Args:
        problem: What ``Settings.subject`` says.
        arch: An architecture.
        rule: A registered rule.
        optimizer: As in ``Settings``.
        batch: Examples in a batch.
        device: Where.
    """

    problem: str
    arch: str
    rule: str
    optimizer: str
    batch: int
    device: str

    def __str__(self) -> str:
        return f"step of {self.arch} {self.rule}"


@dataclass(frozen=True)
class Cost(Kept):
    """What came out.

    Args:
        cell: Whose step.
        seconds: Of a step with its forward pass, median.
        ratio: Over a step with the summed loss in plain torch, both in turn.
        peak: Most bytes held at once beyond what was held before; None where nobody counts.
        passes: Backward passes down to the first layer; one may carry all tasks' gradients.
    """

    cell: CostCell
    seconds: float
    ratio: float
    peak: int | None
    passes: int


def measure(settings: Settings, cell: CostCell) -> Cost:
    """Measure on the first batch of training, in one thread.

    Raises:
        RuntimeError: If the rule or the plain sum fails.
    """
    with torch.random.fork_rng(devices=[]), one_thread():
        makers = {
            "summed": partial(_step, settings, cell, None),
            cell.rule: partial(_step, settings, cell, cell.rule),
        }
        device = torch.device(cell.device)
        times, complaints = in_turn(makers, SECONDS, device)
        if complaints:
            raise RuntimeError("; ".join(complaints.values()))
        ours, summed = times[cell.rule].median, times["summed"].median
        peak = peaks([makers[cell.rule]], device)
        passes = _passes(settings, cell)
    return Cost(cell, ours, ours / summed, peak[0] if peak else None, passes)


def _parts(settings: Settings, cell: CostCell) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    """Return a model, what evaluates its losses, and what steps it."""
    data = settings.load(0)
    torch.manual_seed(0)
    model = new_model(data, cell.arch, data.tasks).to(cell.device)
    drawn = next(data.train.batches(cell.batch, Generator().manual_seed(0)))
    losses = partial(further, model, data.tasks, some(drawn, data.tasks, cell.device))
    return model, losses, OPTIMIZERS[cell.optimizer](model.parameters(), lr=1e-6)


def _step(settings: Settings, cell: CostCell, rule: str | None) -> Step:
    _, losses, optimizer = _parts(settings, cell)
    if rule is None:
        return summed_step(optimizer, losses)
    return balanced_step(optimizer, losses, rule, on_nonfinite="skip")


def _passes(settings: Settings, cell: CostCell) -> int:
    """Count the passes that reach the output of the first layer in one step."""
    model, losses, optimizer = _parts(settings, cell)
    step = balanced_step(optimizer, losses, cell.rule, on_nonfinite="skip")
    for _ in range(WARMUP):
        step()
    outputs: list[Tensor] = []
    grads: list[Tensor] = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        if not outputs and isinstance(output, Tensor) and output.requires_grad:
            outputs.append(output)
            output.register_hook(grads.append)  # type: ignore[no-untyped-call]  # torch's

    for module in model.modules():
        if not [*module.children()]:
            module.register_forward_hook(watch)
    step()
    return len(grads)
