"""What users may set, checked before anything is trained."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradbal._utils import checks
from gradbal._utils.checks import did_you_mean
from gradbal.lab import problems
from gradbal.lab.checks import check_device, check_packages, check_rules, new_folder
from gradbal.lab.models.architectures import ARCHITECTURES, PLAIN
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training.loop import OPTIMIZERS, Load

OWNER = "gradbal compare"
PACKAGES = ("scipy", "matplotlib", "scikit-learn")  # for intervals, pictures and metrics
RULES_BY_DEFAULT = ("uw", "famo", "pcgrad", "cagrad", "nash_mtl", "upgrad")
Options = tuple[tuple[str, Any], ...]  # of a loader, by name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a comparison.

    Args:
        problem: One of ``gradbal.lab.problems.PROBLEMS``, or a function from a seed to a
            problem; with several processes one that can be pickled.
        path: Where the problem's files are; None for those that need none.
        options: Further arguments of the problem's loader, as pairs of name and value.
        rules: Registered names; ``ew``, the plain sum, is added.
        archs: How the tasks share parameters, some of those in ``gradbal.lab.models``.
        front: How many vectors of fixed weights to try beside the plain sum: evenly on the line
            between two tasks, else at random on the simplex.
        lrs: Learning rates to try; everyone tries all of them.
        optimizer: ``"sgd"`` with momentum 0.9, ``"adam"`` or ``"adamw"``.
        epochs: Most passes through the training examples.
        patience: Epochs without a better one on validation after which a run ends.
        batch: Examples in a batch; None for the problem's own.
        seeds: How many; a seed draws the split, the weights at the start, the batches and what
            the rule draws, the same for everyone.
        tuned_on: On how many of the seeds all learning rates are tried; the others are run with
            the best one only.
        jobs: Processes, one thread each.
        device: Where to train, as torch names it.
        out: Folder for finished runs, tables and pictures.

    Raises:
        ValueError: If one of them cannot be; the sentence says which and why.
    """

    problem: str | Load
    path: Path | None = None
    options: Options = ()
    rules: tuple[str, ...] = RULES_BY_DEFAULT
    archs: tuple[str, ...] = (PLAIN,)
    front: int = 9
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    optimizer: str = "adam"
    epochs: int = 50
    patience: int = 10
    batch: int | None = None
    seeds: int = 5
    tuned_on: int = 2
    jobs: int = 1
    device: str = "cpu"
    out: Path = Path("gradbal-compare")

    def __post_init__(self) -> None:
        check_rules(OWNER, self.rules)
        for arch in self.archs:
            if arch not in ARCHITECTURES:
                raise ValueError(
                    f"{OWNER}: unknown architecture {arch!r}.{did_you_mean(arch, ARCHITECTURES)} "
                    f"There are {', '.join(ARCHITECTURES)}."
                )
        if not (self.archs and self.lrs):
            raise ValueError(f"{OWNER}: `archs` and `lrs` must name at least one each.")
        for lr in self.lrs:
            checks.positive(OWNER, lrs=lr)
        checks.one_of(OWNER, tuple(OPTIMIZERS), optimizer=self.optimizer)
        checks.at_least(OWNER, 0, front=self.front)
        one = {"epochs": self.epochs, "patience": self.patience, "jobs": self.jobs}
        checks.at_least(OWNER, 1, **one, seeds=self.seeds, batch=self.batch or 1)
        checks.between(OWNER, 1, self.seeds, tuned_on=self.tuned_on)
        check_device(OWNER, self.device)

    @property
    def subject(self) -> str:
        """What the problem is called, with all that its loader is told but the seed."""
        name = self.problem if isinstance(self.problem, str) else self.problem.__qualname__
        words = [name, *([self.path.name] if self.path else [])]
        return " ".join([*words, *(f"{option}={value!r}" for option, value in self.options)])

    @property
    def contestants(self) -> tuple[str, ...]:
        """The rules, each once, the plain sum first."""
        return tuple(dict.fromkeys(("ew", *self.rules)))

    def load(self, seed: int) -> Problem:
        """Return the problem as a seed has it."""
        return _loaded(self.problem, self.path, self.options, seed)

    def prepare(self) -> Problem:
        """Check before training what is needed after it; return the problem of the first seed.

        Raises:
            ValueError: If a package is missing, if the problem cannot be loaded, or if no file
                can be written into the folder.
        """
        check_packages(OWNER, "compare", PACKAGES)
        data = self.load(0)
        new_folder(OWNER, self.out)
        return data


@lru_cache(maxsize=2)
def _loaded(problem: str | Load, path: Path | None, options: Options, seed: int) -> Problem:
    if isinstance(problem, str):
        return problems.load(problem, path, seed=seed, **dict(options))
    return problem(seed)
