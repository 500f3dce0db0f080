"""What the cheap modes save in time and cost in quality, on two real problems.

``python -m benchmarks.cheap_modes --help``, from the root of the repository.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import fmean, median
from time import process_time
from typing import Any

import torch
from torch import Tensor

from arch_zoo import HPS
from benchmarks import options as opts
from benchmarks import problems
from benchmarks.frontier import EXACT, draw, frontier, table
from benchmarks.tables import PACKAGES
from gradbal import MTLOptimizer, engines, make_rule, rule_names
from gradbal.lab.compare.tables import made_by
from gradbal.lab.models.architectures import PLAIN
from gradbal.lab.problems import mulan
from gradbal.lab.problems.problem import Batch, Problem
from gradbal.lab.training import resume
from gradbal.lab.training.loop import (
    ALONE,
    Tasks,
    epoch_of,
    figures,
    further,
    new_model,
    one_thread,
    tasks_of,
)
from gradbal.lab.training.resume import Kept
from gradbal.lab.training.summary import main_figures
from gradbal.rules._base import GramRule

Problems = Mapping[str, Callable[..., Problem]]

MODES: dict[str, Callable[[HPS], dict[str, Any]]] = {
    EXACT: lambda model: {},
    "every 2nd": lambda model: {"update_every": 2},
    "every 5th": lambda model: {"update_every": 5},
    "every 10th": lambda model: {"update_every": 10},
    "representation": lambda model: {"engine": engines.Representation()},
    "last stage": lambda model: {"gram_over": [*model.encoder.children()][-1]},
    "sketch 4": lambda model: {"engine": engines.Sketched(size=4)},
    "sketch 16": lambda model: {"engine": engines.Sketched(size=16)},
    "sketch 64": lambda model: {"engine": engines.Sketched(size=64)},
}
WIDTH = 512  # of the layers of an MLP
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
BLOCK, TWIN = 10, 3  # steps that are timed together, a multiple of every period; plain ones of them


@dataclass(frozen=True, order=True)
class Cell:
    """What is trained.

    Args:
        problem: Name of the problem.
        rule: A registered rule; the task's name for a task alone.
        mode: One of ``MODES``, or ``ALONE``.
        seed: Seed of the split, the weights at the start, the batches and the rule.
        steps: Steps of training.
        lr: Learning rate of Adam.
        validation: Scored on a part of the training examples.
    """

    problem: str
    rule: str
    mode: str
    seed: int
    steps: int
    lr: float
    validation: bool = False

    def __str__(self) -> str:
        return f"{self.problem} {self.rule} {self.mode} seed {self.seed} lr {self.lr:g}"


@dataclass(frozen=True)
class Record(Kept):
    """What came out.

    Args:
        cell: What was trained.
        scores: On the held-out examples after the last step, by task.
        loss: The sum of the losses on them.
        time: Processor time of a step over that of the plain summed loss, median over blocks.
    """

    cell: Cell
    scores: dict[str, float]
    loss: float
    time: float


# with networks whose passes take time
DIGITS = partial(problems.digits, channels=64)
TUMOURS = partial(problems.tumours, width=WIDTH)


def from_file(path: Path, targets: int, seed: int, validation: bool = False) -> Problem:
    """Return the regression of a file, with a wide network and squared errors as figures."""
    data = mulan.load(path, seed=seed, targets=targets, validation=validation, width=WIDTH)
    return replace(data, tasks=dict.fromkeys(data.tasks, problems.NUMBER))


def train(known: Problems, cell: Cell) -> Record:
    """Train and score a cell, in one thread; leaves the global generator alone."""
    data = known[cell.problem](seed=cell.seed, validation=cell.validation)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(cell.seed)
        tasks = tasks_of(data, cell.mode, cell.rule)
        model = new_model(data, PLAIN, tasks)
        time = _fit(model, tasks, data, cell)
    held = data.validation if cell.validation else data.test
    scores = main_figures(figures(model, tasks, held, len(held)), tasks)
    with torch.no_grad():
        loss = total(further(model.eval(), tasks, next(held.batches(len(held))))).item()
    return Record(cell, scores, loss, time)


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Return the plain sum."""
    return torch.stack([*losses.values()]).sum()


def _fit(model: HPS, tasks: Tasks, data: Problem, cell: Cell) -> float:
    """Train; return the time of a step, of which a twin takes some plain ones in between."""
    adam = partial(torch.optim.Adam, lr=cell.lr)
    twin = deepcopy(model)
    plain = adam(twin.parameters())
    rule, options = ("ew", {}) if cell.mode == ALONE else (cell.rule, MODES[cell.mode](model))
    mtl_opt = MTLOptimizer(adam(model.parameters()), rule, seed=cell.seed, **options)

    def step(batch: Batch) -> None:
        mtl_opt.step(further(model, tasks, batch))

    def plain_step(batch: Batch) -> None:
        plain.zero_grad()
        total(further(twin, tasks, batch)).backward()
        plain.step()

    ratios = []
    feed = islice(_full_batches(data, cell.seed), cell.steps)
    while block := list(islice(feed, BLOCK)):
        seconds = fmean([_timed(step, batch) for batch in block])
        ratios.append(seconds / fmean([_timed(plain_step, batch) for batch in block[:TWIN]]))
    return median(ratios)


def _full_batches(data: Problem, seed: int) -> Iterator[Batch]:
    """Yield batches without end, without the shorter last one of an epoch."""
    for epoch in count():
        for batch in epoch_of(data.train, data.batch, seed, epoch):
            if len(batch.inputs) == data.batch:
                yield batch


def _timed(step: Callable[[Batch], None], batch: Batch) -> float:
    begin = process_time()
    step(batch)
    return process_time() - begin


def tuning_cells(known: Problems, options: argparse.Namespace) -> list[Cell]:
    """Return the cells by which the learning rate of each problem is chosen."""
    return [
        Cell(name, "ew", EXACT, seed, options.steps, lr, validation=True)
        for seed in options.seeds
        for name in known
        for lr in RATES
    ]


def choose(records: Mapping[Cell, Record]) -> dict[str, float]:
    """Return for each problem the learning rate with the lowest validation loss, see above."""
    losses: dict[str, dict[float, list[float]]] = {}
    for cell, record in records.items():
        losses.setdefault(cell.problem, {}).setdefault(cell.lr, []).append(record.loss)
    return {name: min(some, key=lambda lr: median(some[lr])) for name, some in losses.items()}


def cells_of(
    known: Problems, rates: Mapping[str, float], options: argparse.Namespace
) -> list[Cell]:
    """Return all cells that are tested, seed by seed, tasks alone and the plain sum first."""
    cells = []
    for seed in options.seeds:
        for name, make in known.items():
            pairs = [(task, ALONE) for task in make(seed=seed).tasks] + [("ew", EXACT)]
            pairs += [(rule, mode) for rule in options.rules for mode in options.modes]
            cells += [Cell(name, *pair, seed, options.steps, rates[name]) for pair in pairs]
    return cells


def render(
    known: Problems, records: Mapping[Cell, Record], options: argparse.Namespace, command: str
) -> str:
    """Write the tables, and draw a picture for each problem beside."""
    parts = [f"# Cheap modes\n\n{made_by(command, *PACKAGES)}\n\n{explanation(options)}"]
    for name, make in known.items():
        some = [record for cell, record in records.items() if cell.problem == name]
        tasks = make(seed=options.seeds[0]).tasks
        frontiers = {rule: frontier(rule, some, tasks) for rule in options.rules}
        picture = options.out.with_name(f"{options.out.stem}_{name}.png")
        title = f"{name}, {len(tasks)} tasks, learning rate {some[0].cell.lr:g}"
        draw(frontiers, title, picture)
        parts += [f"## {title}", *(table(rule, found) for rule, found in frontiers.items())]
        parts.append(f"![Step time against Delta_m]({picture.name})")
    return "\n\n".join(parts) + "\n"


def explanation(options: argparse.Namespace) -> str:
    """Write what was done."""
    rates = ", ".join(f"{rate:g}" for rate in RATES)
    return f"""\
{options.steps} steps of Adam for every cell, {len(options.seeds)} seeds. A seed sets the split, the
weights at the start, the batches and the rule, the same for all modes. The learning rate was chosen
for each problem among {rates} by the summed loss of the plain sum on a
quarter of the training examples, median over the seeds; no test example chose anything.

Step time is processor time of one thread over that of the plain summed loss, both in turn in one
process, median. Delta_m is the mean change for the worse against each task alone, trained with the
same budget, in percent: lower is better. ± is the 95 % interval over the seeds, for a difference
that of pairs with the same seed; differences are bold where it leaves out zero."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a cell failed."""
    options = parse(arguments)
    known: Problems = {"digits": DIGITS, "tumours": TUMOURS}
    given = list(sys.argv[1:] if arguments is None else arguments)
    if options.mulan:
        known = {
            "digits": DIGITS,
            options.mulan.stem: partial(from_file, options.mulan, options.targets),
        }
        given = [text.replace(str(options.mulan), options.mulan.name) for text in given]
    run = partial(
        resume.run, path=options.out, train=partial(train, known), kind=Record, jobs=options.jobs
    )
    records, failures = run(tuning_cells(known, options))
    if not failures:
        records, failures = run(cells_of(known, choose(records), options))
        command = f"python -m benchmarks.cheap_modes {shlex.join(given)}"
        text = render(known, records, options, command)
        options.out.with_suffix(".md").write_text(text)
        print(text)
    for cell, reason in failures.items():
        print(f"FAILED {cell}: {reason}", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and the file that it names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cheap_modes", description=__doc__)
    rules = [name for name in rule_names() if isinstance(make_rule(name), GramRule)]
    parser.add_argument("--rules", nargs="+", choices=rules, default=["upgrad"], metavar="RULE")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), metavar="SEED")
    parser.add_argument("--steps", type=opts.positive, default=400, help="default: %(default)s")
    parser.add_argument("--mulan", type=Path, help="an ARFF file that takes the place of tumours")
    parser.add_argument("--targets", type=int, help="how many of its last columns are targets")
    opts.add_options(parser, "cheap_modes")
    options = parser.parse_args(arguments)
    if len(set(options.seeds)) < 2:
        parser.error("--seeds: an interval needs two different ones")
    if (options.mulan is None) != (options.targets is None):
        parser.error("--mulan and --targets need each other")
    if options.mulan:
        try:
            data = from_file(options.mulan, options.targets, options.seeds[0], validation=True)
        except ValueError as error:
            parser.error(str(error))
        if len(data.train) < data.batch:
            name = options.mulan.name
            parser.error(f"{name}: {len(data.train)} rows for training; a batch needs {data.batch}")
    return options


if __name__ == "__main__":
    sys.exit(main())
