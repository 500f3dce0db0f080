"""Whether AutoMTL finds a better network than hard sharing, other architectures, and chance.

``python -m benchmarks.automtl --help``, from the root of the repository.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import process_time
from typing import Any

import torch
from torch import Generator, nn

from arch_zoo import AutoMTL
from arch_zoo.automtl import ExpectedCost, Temperature
from arch_zoo.automtl.costs import model_cost
from arch_zoo.automtl.presets import SMALL
from arch_zoo.automtl.search import Data, search
from benchmarks import options as opts
from benchmarks import scenes
from benchmarks.automtl_report import ALONE, FOUND, RANDOM, page
from gradbal import MTLOptimizer, rule_names
from gradbal.lab.demo.automtl import STAGES
from gradbal.lab.problems import two_digits
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training import loop as training
from gradbal.lab.training import resume
from gradbal.lab.training.loop import one_thread
from gradbal.lab.training.resume import Kept

LR = 3e-3  # of Adam, the same for every method
PRESET = replace(SMALL, posttrain=replace(SMALL.posttrain, steps=0))  # it is trained as the others
OWN_NORMS = f"{FOUND}, own norms"
METHODS = ("HPS", "CrossStitch", "MTAN", FOUND, OWN_NORMS)
NEAR = 0.03  # by how much the size of a random policy may be off
TRIES = 20_000


def digits(seed: int) -> Problem:
    """Return the pictures of two digits, with a network of seven convolutions."""
    return replace(two_digits.load(seed=seed, copies=(40, 10, 20)), stages=STAGES)


PROBLEMS = {"two_digits": digits, "scenes": scenes.load}


@dataclass(frozen=True, order=True)
class Cell:
    """What is trained.

    Args:
        problem: One of ``PROBLEMS``.
        method: One of ``METHODS``, ``ALONE``, or ``RANDOM`` with a number.
        rule: A registered rule; the task's name for a task alone.
        seed: Of the data, the weights at the start, the batches, the rule, and the policies.
        epochs: Passes through the training examples.
        against: Validation figures of the tasks alone, by which epochs are chosen.
        size: How many parameters a random policy is to have.
    """

    problem: str
    method: str
    rule: str
    seed: int
    epochs: int
    against: tuple[float, ...] = ()
    size: int = 0

    def __str__(self) -> str:
        return f"{self.problem} {self.method} {self.rule} seed {self.seed}"


@dataclass(frozen=True)
class Record(Kept):
    """What came out.

    Args:
        cell: What was trained.
        epoch: The one that was best on validation.
        validation: Its figures there, by task.
        test: Its figures on the test examples.
        parameters: Of the network that was trained in the end.
        operations: Its multiply-adds on one example.
        policy: The branch of each operator by task, if there is a policy.
        search_s: Processor seconds of the search.
    """

    cell: Cell
    epoch: int
    validation: dict[str, dict[str, float]]
    test: dict[str, dict[str, float]]
    parameters: int
    operations: int
    policy: dict[str, list[int]] = field(default_factory=dict)
    search_s: float = 0.0


Records = Mapping[Cell, Record]


def train(cell: Cell) -> Record:
    """Search where there is something to search, train, and score; in one thread."""
    data = PROBLEMS[cell.problem](cell.seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(cell.seed)
        tasks = training.tasks_of(data, cell.method, cell.rule)
        begin, policy = process_time(), {}
        if cell.method.startswith((FOUND, RANDOM)):
            supermodel = _supermodel(data, "task" if cell.method == OWN_NORMS else "shared")
            if cell.method.startswith(FOUND):
                model, policy = _searched(supermodel, data, cell)
            else:
                model, policy = _random(supermodel, cell)
        else:
            model = training.new_model(data, cell.method, tasks)
        searched = process_time() - begin
        run = training.Cell(
            problem=cell.problem,
            arch=cell.method,
            rule=cell.rule,
            weights=(),
            optimizer="adam",
            lr=LR,
            batch=data.batch,
            epochs=cell.epochs,
            patience=cell.epochs,
            seed=cell.seed,
            against=cell.against,
            device="cpu",
        )
        found = training.fit(model, tasks, data, run)
        cost = model_cost(model, next(data.test.batches(1)).inputs)
    return Record(cell, found.epoch, found.validation, found.test, *cost, policy, searched)


def _supermodel(data: Problem, norm: str) -> AutoMTL:
    backbone = nn.Sequential(*(stage() for stage in data.stages))
    heads = {name: head() for name, head in data.heads.items()}
    tau = Temperature(PRESET.tau_start, PRESET.tau_factor, PRESET.tau_every)
    return AutoMTL(backbone, heads, next(data.train.batches(2)).inputs, norm=norm, tau=tau)


def _searched(model: AutoMTL, data: Problem, cell: Cell) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return the network that a search finds, as it is before training, and its policy."""
    train: Any = data.train  # in memory
    order = torch.randperm(len(train), generator=Generator().manual_seed(cell.seed))
    weights, policy = (train.take(half) for half in order.tensor_split(2))
    loaders = {"train": train, "weights": weights, "policy": policy}
    found, record = search(
        model,
        Data(
            **{
                k: partial(training.epoch_of, part, data.batch, cell.seed)
                for k, part in loaders.items()
            }
        ),
        {name: task.loss for name, task in data.tasks.items()},
        lambda model: 0.0,  # nothing is chosen by it
        lambda base: MTLOptimizer(base, cell.rule, seed=cell.seed, on_nonfinite="skip"),
        PRESET,
        seed=cell.seed,
        progress=False,
    )
    return found.train(), record.policy


def _random(model: AutoMTL, cell: Cell) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return the network of a random policy of a size, and the policy.

    The shares of the three branches are drawn evenly from the simplex, then the branch of every
    operator and task by these shares; the first policy whose size is near is taken.

    Raises:
        RuntimeError: If none was.
    """
    number = int(cell.method.removeprefix(RANDOM))
    generator = Generator().manual_seed(1_000 * cell.seed + number)
    policy, cost = model.policy, ExpectedCost("parameters")
    whole = len(model.tasks) * policy.sizes[:, 0].sum().item()
    shared = {task: torch.eye(3)[torch.zeros(len(policy.legal)).long()] for task in model.tasks}
    rest = size_of(model.lower(shared)) - whole * cost(shared, policy).item()
    for _ in range(TRIES):
        shares = torch.empty(3).exponential_(generator=generator)
        rows = (shares * policy.legal).repeat(len(model.tasks), 1)
        drawn = rows.multinomial(1, generator=generator).view(len(model.tasks), -1)
        choices = {task: torch.eye(3)[row] for task, row in zip(model.tasks, drawn, strict=True)}
        about = rest + whole * cost(choices, policy).item()  # without the norms of parted tasks
        if abs(about / cell.size - 1) < 2 * NEAR:
            found = model.lower(choices)
            if abs(size_of(found) / cell.size - 1) < NEAR:
                return found, {t: row.tolist() for t, row in zip(model.tasks, drawn, strict=True)}
    raise RuntimeError(f"no random policy has {cell.size} parameters")


def size_of(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def alone_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return the tasks alone, against which epochs are chosen."""
    return [
        Cell(name, ALONE, task, seed, options.epochs)
        for name in options.problems
        for task in PROBLEMS[name](seed).tasks
    ]


def method_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return the methods, which need the records of the tasks alone."""
    cells = []
    for name in options.problems:
        tasks = PROBLEMS[name](seed).tasks
        against = tuple(
            records[Cell(name, ALONE, task, seed, options.epochs)].validation[task][known.select]
            for task, known in tasks.items()
        )
        cells += [
            Cell(name, method, rule, seed, options.epochs, against)
            for rule in options.rules
            for method in options.methods
        ]
    return cells


def random_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return random policies, of the size of those that were found."""
    return [
        replace(cell, method=f"{RANDOM}{number}", size=record.parameters)
        for cell, record in records.items()
        if cell.method == FOUND and cell.seed == seed
        for number in range(1, options.policies + 1)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a cell failed."""
    options = parse(arguments)
    records: dict[Cell, Record] = {}
    for seed in options.seeds:
        for cells in (alone_cells, method_cells, random_cells):
            found, failures = resume.run(
                cells(seed, records, options), options.out, train, Record, jobs=options.jobs
            )
            records |= found
            if failures:
                for cell, reason in failures.items():
                    print(f"FAILED {cell}: {reason}", file=sys.stderr)
                return 1
    given = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.automtl {shlex.join(given)}".strip()
    problems = {name: PROBLEMS[name](0).tasks for name in options.problems}
    text = page(records, problems, options, command)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.automtl", description=__doc__)
    known, default = [*PROBLEMS], ["ew", "upgrad"]
    parser.add_argument("--problems", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--rules", nargs="+", choices=rule_names(), default=default, metavar="RULE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), metavar="SEED")
    parser.add_argument("--epochs", type=opts.positive, default=10, help="default: %(default)s")
    parser.add_argument(
        "--policies", type=opts.positive, default=3, help="random ones (default: %(default)s)"
    )
    opts.add_options(parser, "automtl", "docs/results")
    options = parser.parse_args(arguments)
    if len(set(options.seeds)) < 2:
        parser.error("--seeds: an interval needs two different ones")
    return options


if __name__ == "__main__":
    sys.exit(main())
