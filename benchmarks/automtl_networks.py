"""The networks of the AutoMTL benchmark: searched, drawn by chance, given, or without a policy."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from time import process_time
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from arch_zoo import AutoMTL
from arch_zoo.automtl import ExpectedCost, Temperature
from arch_zoo.automtl.costs import model_cost
from arch_zoo.automtl.operators import Operator
from arch_zoo.automtl.presets import SMALL
from arch_zoo.automtl.record import Data
from arch_zoo.automtl.regularisers import Regulariser
from arch_zoo.automtl.search import search
from arch_zoo.automtl.stages import train_step
from benchmarks import scenes
from benchmarks.automtl_report import FOUND, RANDOM
from gradbal import MTLOptimizer
from gradbal.lab.demo.automtl import CHANNELS, stages
from gradbal.lab.problems import two_digits
from gradbal.lab.problems.problem import Examples, Problem
from gradbal.lab.training import loop as training
from gradbal.lab.training.loop import ALONE, one_thread
from gradbal.lab.training.resume import Kept

Rows = tuple[tuple[int, ...], ...]  # for each task the branch of each operator
LR = 3e-3  # of Adam, the same for every method
PRESET = replace(SMALL, posttrain=replace(SMALL.posttrain, steps=0))  # it is trained as the others
OWN_NORMS = f"{FOUND}, own norms"
PERMUTED = f"{FOUND}, permuted labels"
COSTS = f"{FOUND}, expected parameters"
AFFINITY = f"{FOUND}, affinity start"
WIDE = "HPS, wide"  # as wide as takes the parameters of another network
GIVEN = "policy"  # a network of a policy that is in the cell
NEAR = 0.03  # by how much the size of a random policy may be off
TRIES = 20_000
STEPS = 24  # of the width of hard sharing between its own and twice that
EVERY = 10  # steps between two looks at the gradients of the tasks


def digits(seed: int, width: float = 1.0) -> Problem:
    """Return the pictures of two digits, with a network of seven convolutions.

    Args:
        seed: Of the pictures.
        width: Factor of the channels of the network.
    """
    channels = tuple(round(width * channel) for channel in CHANNELS)
    return replace(two_digits.load(seed=seed, copies=(40, 10, 20)), stages=stages(channels))


PROBLEMS: dict[str, Callable[..., Problem]] = {"two_digits": digits, "scenes": scenes.load}


@dataclass(frozen=True)
class Search:
    """How a policy is searched.

    Args:
        norm: As for ``AutoMTL``.
        skip: As there.
        regulariser: As there; by default the published one.
        weight: Of the regulariser; by default that of the preset.
        permuted: Search on labels that are permuted among the training examples, for each task on
            its own, so that inputs say nothing about them.
        affinity: Factor of what the logits of shared branches start from: the cosine of the task's
            gradient and that of the others, less its mean over operators; 0 for equal starts.
    """

    norm: str = "shared"
    skip: str = "geometry"
    regulariser: Regulariser | None = None
    weight: float | None = None
    permuted: bool = False
    affinity: float = 0.0


SEARCHES = {
    FOUND: Search(),
    OWN_NORMS: Search(norm="task"),
    **{f"{FOUND}, weight {weight:g}": Search(weight=weight) for weight in (0.0, 1e-3, 1e-1)},
    PERMUTED: Search(permuted=True),
    COSTS: Search(skip="off", regulariser=ExpectedCost("parameters"), weight=0.3),
    AFFINITY: Search(affinity=5.0),
}
METHODS = ("HPS", "CrossStitch", "MTAN", FOUND, OWN_NORMS)


@dataclass(frozen=True, order=True)
class Cell:
    """What is trained.

    Args:
        problem: One of ``PROBLEMS``.
        method: One of ``METHODS``, ``SEARCHES``, ``ALONE``, ``WIDE``, ``GIVEN``, or ``RANDOM`` with
            a number.
        rule: A registered rule; the task's name for a task alone.
        seed: Of the data, the weights at the start, the batches, the rule, and the policies.
        epochs: Passes through the training examples; 0 for a search whose network is not trained.
        against: Validation figures of the tasks alone, by which epochs are chosen.
        size: How many parameters a random policy or a wide network is to have.
        policy: The branch of each operator for each task, if it is given.
    """

    problem: str
    method: str
    rule: str
    seed: int
    epochs: int
    against: tuple[float, ...] = ()
    size: int = 0
    policy: tuple[tuple[int, ...], ...] = ()

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


def alone_figures(problem: str, seed: int, epochs: int, records: Records) -> tuple[float, ...]:
    """Return the validation figure of each task alone, by which the others choose their epoch."""
    tasks = PROBLEMS[problem](seed).tasks
    return tuple(
        records[Cell(problem, ALONE, task, seed, epochs)].validation[task][known.select]
        for task, known in tasks.items()
    )


def train(cell: Cell) -> Record:
    """Search where there is something to search, train, and score; in one thread."""
    data = PROBLEMS[cell.problem](cell.seed)
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(cell.seed)
        tasks = training.tasks_of(data, cell.method, cell.rule)
        begin = process_time()
        policy: dict[str, list[int]] = {}
        if cell.policy:
            model, policy = given(supermodel(data), cell.policy)
        elif cell.method in SEARCHES:
            model, policy = searched(data, cell)
        elif cell.method.startswith(RANDOM):
            model, policy = random_network(supermodel(data), cell)
        elif cell.method == WIDE:
            model = wide(cell)
        else:
            model = training.new_model(data, cell.method, tasks)
        spent = process_time() - begin
        cost = model_cost(model, next(data.test.batches(1)).inputs)
        if not cell.epochs:
            return Record(cell, 0, {}, {}, *cost, policy, spent)
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
    return Record(cell, found.epoch, found.validation, found.test, *cost, policy, spent)


def supermodel(data: Problem, kind: Search = SEARCHES[FOUND]) -> AutoMTL:
    """Return a network in which everything is still to be chosen."""
    backbone = nn.Sequential(*(stage() for stage in data.stages))
    heads = {name: head() for name, head in data.heads.items()}
    tau = Temperature(PRESET.tau_start, PRESET.tau_factor, PRESET.tau_every)
    example = next(data.train.batches(2)).inputs
    return AutoMTL(
        backbone,
        heads,
        example,
        norm=kind.norm,
        skip=kind.skip,
        tau=tau,
        regulariser=kind.regulariser,
    )


def searched(data: Problem, cell: Cell) -> tuple[nn.Module, dict[str, list[int]]]:
    """Run a search; return the untrained network that it found, and its policy."""
    kind = SEARCHES[cell.method]
    model = supermodel(data, kind)
    train: Any = data.train  # in memory
    generator = Generator().manual_seed(cell.seed)
    order = torch.randperm(len(train), generator=generator)
    if kind.permuted:
        train = permuted(train, generator)
    weights, policy = (train.take(half) for half in order.tensor_split(2))
    loaders = {"train": train, "weights": weights, "policy": policy}
    losses = {name: task.loss for name, task in data.tasks.items()}
    if kind.affinity:
        cosines = affinities(deepcopy(model), train, losses, data.batch, cell)
        with torch.no_grad():
            for task, rows in model.policy.logits.items():
                rows[:, 0] = kind.affinity * (cosines[task] - cosines[task].mean())
    found, record = search(
        model,
        Data(
            **{
                k: partial(training.epoch_of, part, data.batch, cell.seed)
                for k, part in loaders.items()
            }
        ),
        losses,
        lambda model: 0.0,  # nothing is chosen by it
        partial(_balanced, cell),
        PRESET if kind.weight is None else replace(PRESET, policy_weight=kind.weight),
        seed=cell.seed,
        progress=False,
    )
    return found.train(), record.policy


def permuted(examples: Examples, generator: Generator) -> Examples:
    """Return examples whose labels have changed places, for each task on its own."""
    n = len(examples)
    labels = {t: y[torch.randperm(n, generator=generator)] for t, y in examples.y.items()}
    return replace(examples, y=labels)


def affinities(
    model: AutoMTL, train: Examples, losses: Mapping[str, Any], size: int, cell: Cell
) -> dict[str, Tensor]:
    """Return by task for each operator how its gradient agrees with that of all other tasks.

    It is the mean cosine while everything is shared, for as many steps as the search pre-trains.

    Args:
        model: Is trained.
        train: The training examples.
        losses: By task.
        size: Examples in a batch.
        cell: Its rule and its seed.
    """
    operators = [part.shared for part in model.network.children() if isinstance(part, Operator)]
    everything = as_choices(model, everything_shared(model))
    stage = PRESET.pretrain
    optimizer = _balanced(cell, stage.recipe.optimizer(model.parameters()))
    batches = _endless(partial(training.epoch_of, train, size, cell.seed))
    looks = []
    for step in range(stage.steps):
        inputs, targets = next(batches)
        if step % EVERY == 0:
            outputs = model.decode(model.encode(inputs, choices=everything))
            found = {task: losses[task](output, targets[task]) for task, output in outputs.items()}
            looks.append(_cosines(operators, found))
        train_step(model, losses, optimizer, (inputs, targets), choices=everything)
    return {task: torch.stack([look[task] for look in looks]).mean(0) for task in model.tasks}


def _cosines(operators: Sequence[nn.Module], losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return for each task and operator the cosine of its gradient and the sum of the others'."""
    parameters = [parameter for module in operators for parameter in module.parameters()]
    sizes = [size_of(module) for module in operators]
    gradients = {
        task: torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)]
        ).split(sizes)
        for task, loss in losses.items()
    }
    totals = [torch.stack(rows).sum(0) for rows in zip(*gradients.values(), strict=True)]
    return {
        task: torch.stack(
            [
                functional.cosine_similarity(row, total - row, dim=0)
                for row, total in zip(rows, totals, strict=True)
            ]
        )
        for task, rows in gradients.items()
    }


def _balanced(cell: Cell, base: torch.optim.Optimizer) -> MTLOptimizer:
    return MTLOptimizer(base, cell.rule, seed=cell.seed, on_nonfinite="skip")


def _endless(loader: Callable[[int], Iterator[Any]]) -> Iterator[Any]:
    for epoch in count():
        yield from loader(epoch)


def everything_shared(model: AutoMTL) -> Rows:
    """Return the policy of hard sharing."""
    return ((0,) * len(model.operators),) * len(model.tasks)


def as_choices(model: AutoMTL, rows: Rows) -> dict[str, Tensor]:
    """Return one-hot rows by task, of the branch of each operator for each task."""
    return {t: torch.eye(3)[[*row]] for t, row in zip(model.tasks, rows, strict=True)}


def given(model: AutoMTL, rows: Rows) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return the network of a policy, and the policy by task."""
    network = model.lower(as_choices(model, rows))
    return network, {task: [*row] for task, row in zip(model.tasks, rows, strict=True)}


def random_network(model: AutoMTL, cell: Cell) -> tuple[nn.Module, dict[str, list[int]]]:
    """Return the network of a random policy of a size, and the policy.

    The shares of the three branches are drawn evenly from the simplex, then the branch of every
    operator and task by these shares; the first policy whose size is near is taken.

    Raises:
        RuntimeError: If none was.
    """
    number = int(cell.method.removeprefix(RANDOM))
    generator = Generator().manual_seed(1_000 * cell.seed + number)

    def draw() -> Rows:
        shares = torch.empty(3).exponential_(generator=generator)
        rows = (shares * model.policy.legal).repeat(len(model.tasks), 1)
        drawn = rows.multinomial(1, generator=generator).view(len(model.tasks), -1)
        return tuple(tuple(row.tolist()) for row in drawn)

    return given(model, of_size(model, cell.size, draw))


def of_size(model: AutoMTL, size: int, draw: Callable[[], Rows]) -> Rows:
    """Return the first policy that is drawn whose network has a number of parameters, or nearly.

    Raises:
        RuntimeError: If none was.
    """
    policy, cost = model.policy, ExpectedCost("parameters")
    whole = len(model.tasks) * policy.sizes[:, 0].sum().item()
    shared = as_choices(model, everything_shared(model))
    rest = size_of(model.lower(shared)) - whole * cost(shared, policy).item()
    for _ in range(TRIES):
        rows = draw()
        choices = as_choices(model, rows)
        about = rest + whole * cost(choices, policy).item()  # without the norms of parted tasks
        near = abs(about / size - 1) < 2 * NEAR
        if near and abs(size_of(model.lower(choices)) / size - 1) < NEAR:
            return rows
    raise RuntimeError(f"no random policy has {size} parameters")


def wide(cell: Cell) -> nn.Module:
    """Return hard sharing in the width that comes nearest to a number of parameters."""
    models: list[nn.Module] = []
    while not models or size_of(models[-1]) < cell.size:
        data = PROBLEMS[cell.problem](cell.seed, width=1 + len(models) / STEPS)
        torch.manual_seed(cell.seed)
        models.append(training.new_model(data, "HPS", data.tasks))
    return min(models[-2:], key=lambda model: abs(size_of(model) - cell.size))


def size_of(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
