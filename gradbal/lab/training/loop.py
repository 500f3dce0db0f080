"""One run: a model of one architecture, trained by one rule, stopped by its validation figures."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
from torch import Generator, Tensor, nn

from gradbal.lab.models.architectures import PLAIN, build
from gradbal.lab.problems.problem import Batch, Problem, Split, Task
from gradbal.lab.training.resume import Kept
from gradbal.lab.training.summary import Scores, main_delta_m, main_figures
from gradbal.optimizer import MTLOptimizer
from gradbal.rules._registry import make_rule

ALONE = "alone"  # stands for the architecture where a task is trained by itself
SPARE = 2**32  # between the seed of the batches and that of further batches, for rules with several
Tasks = Mapping[str, Task]
Load = Callable[[int], Problem]  # from a seed
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


@dataclass(frozen=True, order=True)
class Cell:
    """What is trained, in full.

    Args:
        problem: What ``Settings.subject`` says.
        arch: An architecture, or ``ALONE``.
        rule: A registered rule; the task's name for a task alone.
        weights: Fixed weights for the rule ``constant``; else none.
        optimizer: As in ``Settings``.
        lr: Learning rate.
        batch: Examples in a batch.
        epochs: Most passes through the training examples.
        patience: Epochs without a better one after which the run ends.
        seed: As in ``Settings``.
        against: Validation figures of the tasks alone, against which epochs are compared; none for
            a task alone.
        device: Where it is trained.
    """

    problem: str
    arch: str
    rule: str
    weights: tuple[float, ...]
    optimizer: str
    lr: float
    batch: int
    epochs: int
    patience: int
    seed: int
    against: tuple[float, ...]
    device: str

    def __str__(self) -> str:
        return f"{self.arch} {self.rule} lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Record(Kept):
    """What came out.

    Args:
        cell: What was trained.
        curve: After each epoch what the best one is chosen by, lower is better: Delta_m in percent
            of the validation figures that the tasks choose by, or for a task alone this figure,
            with its sign changed where a higher one is better.
        epoch: The best one, counted from 1; 0 if none had finite figures.
        steps: Steps taken until then.
        validation: Figures of that epoch, by task.
        test: Figures of that epoch on the test examples, which chose nothing.
    """

    cell: Cell
    curve: tuple[float, ...]
    epoch: int
    steps: int
    validation: dict[str, dict[str, float]]
    test: dict[str, dict[str, float]]

    @property
    def score(self) -> float:
        """The best of the curve; infinite where there is none."""
        return self.curve[self.epoch - 1] if self.epoch else inf


def train(load: Load, cell: Cell) -> Record:
    """Train, choose the epoch on validation, test once; in one thread, global generators kept."""
    data = load(cell.seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(cell.seed)
        tasks = tasks_of(data, cell.arch, cell.rule)
        model = new_model(data, cell.arch, tasks).to(cell.device)
        return fit(model, tasks, data, cell)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: for tensors this small more of them only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tasks_of(data: Problem, arch: str, rule: str) -> Tasks:
    """Return the tasks that a run learns."""
    return {rule: data.tasks[rule]} if arch == ALONE else data.tasks


def new_model(data: Problem, arch: str, tasks: Tasks) -> Any:  # of arch_zoo, known by name only
    """Return a model that all of its parameters belong to, also those sized by the first input."""
    heads = {name: data.heads[name]() for name in tasks}
    model: Any = build(PLAIN if arch == ALONE else arch, data.stages, heads)
    inputs, _ = some(next(data.train.batches(2)), tasks, "cpu")
    return model.initialize(inputs)


def some(batch: Batch, tasks: Tasks, device: str) -> Batch:
    """Return the part of a batch that belongs to some tasks, on a device."""
    if isinstance(batch.inputs, Tensor):
        inputs: Tensor | dict[str, Tensor] = batch.inputs.to(device)
    else:
        inputs = {name: x.to(device) for name, x in batch.inputs.items() if name in tasks}
    targets = {name: y.to(device) for name, y in batch.targets.items() if name in tasks}
    return Batch(inputs, targets)


def losses_of(model: nn.Module, tasks: Tasks, batch: Batch) -> tuple[dict[str, Tensor], Any]:
    """Return the tasks' losses on a batch, and the auxiliary ones of the architecture."""
    outputs, aux = model(batch.inputs, return_aux=True)
    return {name: tasks[name].loss(out, batch.targets[name]) for name, out in outputs.items()}, aux


def further(model: nn.Module, tasks: Tasks, batch: Batch) -> dict[str, Tensor]:
    """Return the tasks' losses on a batch, for rules that look at several."""
    return losses_of(model, tasks, batch)[0]


def fit(model: Any, tasks: Tasks, data: Problem, cell: Cell) -> Record:
    """Train a model as a cell says, choose the epoch on validation, test once.

    Args:
        model: Of arch_zoo, known by name only; ends with the weights of that epoch.
        tasks: What it learns.
        data: The examples.
        cell: What is trained; its architecture only tells a task alone from the others.
    """
    base = OPTIMIZERS[cell.optimizer](model.parameters(), lr=cell.lr)
    options = {"weights": cell.weights} if cell.weights else {}
    rule = make_rule("ew" if cell.arch == ALONE else cell.rule, **options)
    mtl_opt = MTLOptimizer(base, rule, tasks=[*tasks], seed=cell.seed, on_nonfinite="skip")
    order, spare = (Generator().manual_seed(cell.seed + more) for more in (0, SPARE))
    others = _endless(data.train, cell.batch, spare)
    curve: list[float] = []
    best, found, steps, taken = Record(cell, (), 0, 0, {}, {}), {}, 0, model.state_dict()
    while len(curve) < cell.epochs and len(curve) - best.epoch < cell.patience:
        for drawn in data.train.batches(cell.batch, order):
            losses, aux = losses_of(model, tasks, some(drawn, tasks, cell.device))
            more = [
                partial(further, model, tasks, some(next(others), tasks, cell.device))
                for _ in range(min(mtl_opt.rule.batches) - 1)
            ]
            if any(loss.requires_grad for loss in losses.values()):  # else nobody has a label
                mtl_opt.step(losses, *more, aux=aux)
            steps += 1
        end_epoch(mtl_opt, model)
        found = figures(model, tasks, data.validation, cell.batch, cell.device)
        curve.append(_score(found, tasks, cell))
        if curve[-1] < best.score:
            best = Record(cell, tuple(curve), len(curve), steps, found, {})
            taken = deepcopy(model.state_dict())
    model.load_state_dict(taken)
    test = figures(model, tasks, data.test, cell.batch, cell.device)
    return Record(cell, tuple(curve), best.epoch, best.steps, best.validation or found, test)


def end_epoch(mtl_opt: MTLOptimizer, model: Any) -> None:
    """Tell the rule, and an architecture with a temperature, that an epoch has ended."""
    mtl_opt.end_epoch()
    if hasattr(model, "tau"):
        model.tau.step()


def epoch_of(split: Split, size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Return the batches of an epoch, whose order depends on seed and epoch alone."""
    return split.batches(size, Generator().manual_seed(1_000 * seed + epoch))


def _endless(split: Split, size: int, generator: Generator) -> Iterator[Batch]:
    while True:
        yield from split.batches(size, generator)


@torch.no_grad()
def figures(
    model: nn.Module, tasks: Tasks, split: Split, size: int, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """Return the figures of each task, by its metric.

    Args:
        model: Ends in training mode.
        tasks: What it learns.
        split: The examples.
        size: Examples in a batch.
        device: Where the model is.
    """
    metrics = {name: task.metric() for name, task in tasks.items()}
    model.eval()
    for drawn in split.batches(size):
        batch = some(drawn, tasks, device)
        if batch.targets:
            for name, output in model(batch.inputs).items():
                metrics[name].update(output, batch.targets[name])
    model.train()
    return {name: metric.compute() for name, metric in metrics.items()}


def _score(found: Scores, tasks: Tasks, cell: Cell) -> float:
    """Say how good figures on validation are; infinite where one is not finite."""
    chosen = main_figures(found, tasks)
    if cell.against:
        score = main_delta_m(chosen, dict(zip(tasks, cell.against, strict=True)), tasks)
    else:
        task = tasks[cell.rule]
        score = chosen[cell.rule] * (-1 if task.higher[task.select] else 1)
    return score if isfinite(score) else inf
