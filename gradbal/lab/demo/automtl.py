"""A search on the two-digit pictures: which operators should the three tasks share?

Like the other architectures of the demo, AutoMTL is taken from arch_zoo by name.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from gradbal.lab.demo import plots
from gradbal.lab.demo.contest import Balanced, Learner, judge, train
from gradbal.lab.demo.model import BATCH, TASKS, TwoDigitNet, problem
from gradbal.lab.demo.report import SCORES, Outcome, delta_m, shown
from gradbal.lab.demo.settings import Settings
from gradbal.lab.models.architectures import Stages
from gradbal.lab.models.two_digits import FEATURES, HEIGHT, WIDTH, heads
from gradbal.lab.problems import two_digits
from gradbal.lab.problems.pictures import COPIES
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training.loop import epoch_of, one_thread
from gradbal.optimizer import MTLOptimizer

CHANNELS = (12, 16, 24, 32)  # of the convolutions, from the input on
SHARE = (6, 2)  # of the steps of training: one in six to pre-train, one in two to search
LOOKS = 20  # at the policy while it is searched
HEADER = ("network", "left %", "right %", "distance px", "Delta_m %", "parameters", "operations")
NOTES = f"""\
{SCORES}
operations: multiply-adds on one picture."""
COSTS = f"""\
- All networks start alike and are trained alike. The search comes on top, and only its policy is
  kept. Pre-training takes 1/{SHARE[0]} as many steps, the search 1/{SHARE[1]}, each several times
  as long.
- One seed and one learning rate: this is an example, not a ranking."""
NEXT = """\
What to try next:
  gradbal demo --arch automtl --seed 1     shows how much of the differences is chance
  gradbal demo --arch automtl --rules ew   searches with the plain sum of the losses
  docs/automtl.md                          says how to search in a network of your own"""


def _convolution(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return layer, nn.BatchNorm2d(outputs), nn.ReLU()


def _level(inputs: int, outputs: int) -> nn.Module:
    """Return two convolutions, of which the first halves the picture."""
    return nn.Sequential(*_convolution(inputs, outputs, 2), *_convolution(outputs, outputs, 1))


def _features(channels: int) -> nn.Module:
    inputs = channels * -(-HEIGHT // 8) * -(-WIDTH // 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, FEATURES), nn.ReLU())


def stages(channels: Sequence[int] = CHANNELS) -> Stages:
    """Return makers of seven convolutions and a layer of features.

    Args:
        channels: Of the first convolution, and of the two after each halving of the picture.
    """
    return (
        lambda: nn.Sequential(*_convolution(1, channels[0], 1)),
        *(partial(_level, *pair) for pair in pairwise(channels)),
        partial(_features, channels[-1]),
    )


STAGES = stages()


@dataclass(frozen=True)
class Network:
    """One line of the table.

    Attributes:
        outcome: How it did, under the name that the table has for it.
        parameters: How many it has.
        operations: Its multiply-adds on one picture.
    """

    outcome: Outcome
    parameters: int
    operations: int


@dataclass(frozen=True)
class Findings:
    """What was found, and what it is worth.

    Attributes:
        networks: One network for each task, then hard sharing and AutoMTL under every rule.
        trials: What the search under each rule led to.
    """

    networks: list[Network]
    trials: "list[Trial]"

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table of networks, header first."""
        alone = self.networks[0].outcome.test
        return [
            HEADER,
            *(
                (
                    network.outcome.name,
                    *shown(network.outcome.test),
                    f"{delta_m(network.outcome.test, alone):+.1f}",
                    f"{network.parameters:,}",
                    f"{network.operations:,}",
                )
                for network in self.networks
            ),
        ]

    def words(self) -> str:
        """Say what the columns are, what the numbers of this run mean, and what to try next."""
        alone, *shared = self.networks
        said = []
        for trial, sharing, found in zip(self.trials, shared[::2], shared[1::2], strict=True):
            ours, theirs = (delta_m(n.outcome.test, alone.outcome.test) for n in (found, sharing))
            size, work = (
                getattr(found, of) / getattr(sharing, of) for of in ("parameters", "operations")
            )
            said.append(
                f"- Under {trial.rule}, the network that AutoMTL found has Delta_m {ours:+.1f}, "
                f"hard sharing {theirs:+.1f}.\n  It has {size:.2f} times as many parameters and "
                f"takes {work:.2f} times as many operations."
            )
        meaning = ["What the numbers of this run mean:", *said, COSTS]
        return "\n\n".join([NOTES, "\n".join(meaning), NEXT])


@dataclass(frozen=True)
class Trial:
    """What the search under one rule led to.

    Attributes:
        rule: The rule.
        operators: Names of what was searched.
        record: What the search saw, of arch_zoo.
        models: One network for each task, hard sharing, and what was found, of arch_zoo.
    """

    rule: str
    operators: tuple[str, ...]
    record: Any
    models: dict[str, Any]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table of the policy, header first."""
        policy = self.record.policy
        branches = zip(*(policy[task] for task in TASKS), strict=True)
        return [
            ("operator", *TASKS),
            *(
                (name, *(plots.BRANCHES[branch] for branch in row))
                for name, row in zip(self.operators, branches, strict=True)
            ),
        ]


def run(settings: Settings, *, copies: tuple[int, int, int] = COPIES) -> Findings:
    """Search under every rule, train what was found beside what it must beat, and test once.

    Args:
        settings: What users may set; the epochs are those of training.
        copies: Size of the data set, see :func:`gradbal.lab.problems.pictures.two_digits`.

    Raises:
        ValueError: If a package is missing or no file can be written into the folder.
        KeyboardInterrupt: If interrupted; its text says how far training came.
    """
    settings.prepare()
    with one_thread():
        standard = two_digits.load(seed=settings.seed, copies=copies)
        try:
            trials = [search(rule, standard, settings) for rule in settings.rules]
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the search is not finished, so there is no policy") from None
        data = problem(settings.seed, copies, settings.device)
        return Findings(compare(trials, data, settings), trials)


def search(rule: str, data: Problem, settings: Settings) -> Trial:
    """Search under a rule: half of the pictures for the weights, half for the policy."""
    zoo, driver = import_module("arch_zoo.automtl"), import_module("arch_zoo.automtl.search")
    pictures: Any = data.train  # in memory
    pictures = pictures.to(torch.device(settings.device))
    n = len(pictures)
    steps = settings.epochs * -(-n // BATCH)
    preset = _preset(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        backbone = nn.Sequential(*(stage() for stage in STAGES)).to(settings.device)
        tau = zoo.Temperature(preset.tau_start, preset.tau_factor, preset.tau_every)
        model = zoo.AutoMTL(backbone, heads(), pictures.x[:2], tau=tau).to(settings.device)
    parts = (pictures, *(pictures.take(torch.arange(half, n, 2)) for half in range(2)))
    loaders = (partial(epoch_of, part, BATCH, settings.seed) for part in parts)
    found, record = driver.search(
        model,
        driver.Data(**dict(zip(("train", "weights", "policy"), loaders, strict=True))),
        {name: task.loss for name, task in data.tasks.items()},
        lambda model: 0.0,  # the likeliest policy is taken, and trained with the others below
        lambda base: MTLOptimizer(base, rule, seed=settings.seed),
        preset,
        every=-(-preset.search.steps // LOOKS),
        seed=settings.seed,
    )
    models = import_module("arch_zoo.automtl.table").beside(found.train(), backbone)
    return Trial(rule, model.operators, record, models)


def compare(trials: Sequence[Trial], data: Problem, settings: Settings) -> list[Network]:
    """Train all networks on the same batches and test them."""
    cost = import_module("arch_zoo.automtl.costs").model_cost
    separate, sharing, _ = trials[0].models.values()
    alone = [
        Learner(task, TwoDigitNet(data, copy.deepcopy(sharing)), data, settings) for task in TASKS
    ]
    bodies, together = [separate], []
    for trial in trials:
        _, *both = trial.models.values()
        bodies += both
        for kind, body in zip(("hard sharing", "AutoMTL"), both, strict=True):
            net, name = TwoDigitNet(data, body), f"{kind}, {trial.rule}"
            together.append(Balanced(trial.rule, net, data, settings, name))
    train(alone, together, data, settings)
    baseline, outcomes = judge(alone, together)
    baseline.name = f"{len(TASKS)} networks"
    costs = [cost(body, next(data.test.batches(1)).inputs) for body in bodies]
    return [Network(o, *c) for o, c in zip((baseline, *outcomes), costs, strict=True)]


def draw(found: Findings, folder: Path) -> list[Path]:
    """Draw each policy, and how it came about; return the files."""
    picture = import_module("arch_zoo.automtl.picture").policy_picture
    files = []
    for trial in found.trials:
        choices = {t: F.one_hot(torch.tensor(trial.record.policy[t]), 3).float() for t in TASKS}
        policy, course = (folder / f"{what}-{trial.rule}.png" for what in ("policy", "search"))
        picture(choices, trial.operators).savefig(policy, dpi=120)
        plots.search_course(trial.record.course, course)
        files += [policy, course]
    return files


def _preset(steps: int) -> Any:  # of arch_zoo
    """Return the small schedule, with as many steps as belong to those of training."""
    small = import_module("arch_zoo.automtl.presets").SMALL
    before, during = (max(1, steps // share) for share in SHARE)
    turn = small.policy_steps + small.weight_steps
    cooled = -(-during * small.policy_steps // turn)  # steps of the policy
    return replace(
        small,
        pretrain=replace(small.pretrain, steps=before),
        search=replace(small.search, steps=during),
        posttrain=replace(small.posttrain, steps=0),
        tau_every=max(1, cooled // 10),
    )
