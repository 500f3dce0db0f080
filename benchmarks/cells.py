"""One cell of the table: a model of one architecture, trained by one rule, and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from time import process_time
from typing import Any

import torch

from benchmarks.problems import problem
from gradbal import MTLOptimizer
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training.loop import (
    ALONE,
    Tasks,
    end_epoch,
    epoch_of,
    figures,
    losses_of,
    new_model,
    one_thread,
    tasks_of,
)
from gradbal.lab.training.resume import Kept
from gradbal.lab.training.summary import main_figures

LEARNING_RATE = 3e-3  # of Adam, the same for every cell


@dataclass(frozen=True, order=True)
class Cell:
    """What is trained.

    Args:
        problem: One of ``problems.PROBLEMS``.
        arch: One of ``gradbal.lab.models``'s, or ``ALONE``.
        rule: A registered rule; the task's name for a task alone.
        seed: Seed of the split, the weights at the start, the batches and the rule.
        epochs: Passes through the training examples.
    """

    problem: str
    arch: str
    rule: str
    seed: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.problem} {self.arch} {self.rule} seed {self.seed}"


@dataclass(frozen=True)
class Record(Kept):
    """What came out.

    Args:
        cell: What was trained.
        scores: On the test examples after the last step, by task.
        params: Number of parameters.
        step_ms: Processor time of a step with its forward pass, in milliseconds, median over all
            steps; unlike wall time it leaves out what other processes took.
        loss_before: Mean of the summed training loss over the first tenth of all steps.
        loss_after: The same over the last tenth.
        unmoved: Parameters that are what they were at the start.
    """

    cell: Cell
    scores: dict[str, float]
    params: int
    step_ms: float
    loss_before: float
    loss_after: float
    unmoved: tuple[str, ...]

    @property
    def complaint(self) -> str:
        """What is wrong with the training, or nothing."""
        complaints = []
        if not self.loss_after < self.loss_before:
            before, after = self.loss_before, self.loss_after
            complaints.append(f"the summed loss did not fall ({before:.4g} to {after:.4g})")
        if self.unmoved:
            complaints.append(f"{', '.join(self.unmoved)} did not move")
        return "; ".join(complaints)


def train(cell: Cell) -> Record:
    """Train and score a cell, in one thread; leaves the global generator alone."""
    data = problem(cell.problem, cell.seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(cell.seed)
        tasks = tasks_of(data, cell.arch, cell.rule)
        model = new_model(data, cell.arch, tasks)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses, seconds = _fit(model, tasks, data, cell)
    tenth = max(1, len(losses) // 10)
    return Record(
        cell,
        main_figures(figures(model, tasks, data.test, len(data.test)), tasks),
        sum(p.numel() for p in start.values()),
        1e3 * median(seconds),
        fmean(losses[:tenth]),
        fmean(losses[-tenth:]),
        tuple(name for name, p in model.named_parameters() if torch.equal(p, start[name])),
    )


def _fit(model: Any, tasks: Tasks, data: Problem, cell: Cell) -> tuple[list[float], list[float]]:
    """Train; return the summed loss and the seconds of each step."""
    base = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    mtl_opt = MTLOptimizer(base, "ew" if cell.arch == ALONE else cell.rule, seed=cell.seed)
    totals, seconds = [], []
    for epoch in range(cell.epochs):
        for batch in epoch_of(data.train, data.batch, cell.seed, epoch):
            begin = process_time()
            losses, aux = losses_of(model, tasks, batch)
            mtl_opt.step(losses, aux=aux)
            seconds.append(process_time() - begin)
            totals.append(float(sum(loss.item() for loss in losses.values())))
        end_epoch(mtl_opt, model)
    return totals, seconds


def cells_of(
    problems: Sequence[str],
    archs: Sequence[str],
    rules: Sequence[str],
    seeds: Sequence[int],
    epochs: int,
) -> list[Cell]:
    """Return all cells, seed by seed, each problem's tasks alone first."""
    cells = []
    for seed in seeds:
        for name in problems:
            pairs = [(ALONE, task) for task in problem(name, seed).tasks]
            pairs += [(arch, rule) for arch in archs for rule in rules]
            cells += [Cell(name, arch, rule, seed, epochs) for arch, rule in pairs]
    return cells
