"""What users may set, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import torch

from gradbal._utils import checks
from gradbal._utils.checks import did_you_mean
from gradbal.lab.demo.architectures import ARCHITECTURES, PLAIN
from gradbal.rules._registry import rule_names

OWNER = "gradbal demo"
REFERENCE = "ew"  # always trained: step times are given relative to it
RULES_BY_DEFAULT = ("uw", "pcgrad", "cagrad", "nash_mtl", "upgrad")
SEARCH = "automtl"  # the architecture that is searched for, in a demo of its own
SEARCH_RULES = ("upgrad",)  # by default
ARCHS = (*ARCHITECTURES, SEARCH)
PACKAGES = ("scikit-learn", "matplotlib", "tqdm")
MODULES = {"scikit-learn": "sklearn"}  # of packages that are imported under another name


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the demo.

    Args:
        rules: Registered names; ``ew`` is added where it is missing.
        arch: How the tasks share parameters, one of ``ARCHS``.
        epochs: Passes over the training pictures.
        seed: Seed of the pictures, the initial weights, the batches and the rules.
        device: Where to train, as torch names it.
        out: Folder for the pictures; made if need be.

    Raises:
        ValueError: If one of them cannot be; the sentence says which and why.
    """

    rules: tuple[str, ...] = RULES_BY_DEFAULT
    arch: str = PLAIN
    epochs: int = 14
    seed: int = 0
    device: str = "cpu"
    out: Path = Path("gradbal-demo")

    def __post_init__(self) -> None:
        check_rules(OWNER, self.rules)
        checks.one_of(OWNER, ARCHS, arch=self.arch)
        checks.at_least(OWNER, 1, epochs=self.epochs)
        checks.between(OWNER, 0, 2**32 - 1, seed=self.seed)
        check_device(OWNER, self.device)

    @property
    def contestants(self) -> tuple[str, ...]:
        """The rules to train, each once, the reference first."""
        return tuple(dict.fromkeys((REFERENCE, *self.rules)))

    def prepare(self) -> None:
        """Check before training what is needed after it: the packages, and a folder for files.

        Raises:
            ValueError: If a package is missing, or if no file can be written into the folder.
        """
        check_packages(OWNER, "demo", PACKAGES)
        new_folder(OWNER, self.out)


def check_rules(owner: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless there are rules, and all are registered."""
    if not names:
        raise ValueError(f"{owner}: `rules` must name at least one rule.")
    for name in names:
        if name not in rule_names():
            raise ValueError(
                f"{owner}: unknown rule {name!r}.{did_you_mean(name, rule_names())} "
                "`gradbal list` shows all of them."
            )


def check_device(owner: str, device: str) -> None:
    """Raise ``ValueError`` unless torch can compute there."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError):  # unknown, not built in, or not plugged in
        raise ValueError(
            f"{owner}: `device` must be one that torch can compute on here, got {device!r}."
        ) from None


def check_packages(owner: str, extra: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless all these packages of an extra are installed."""
    missing = [name for name in names if find_spec(MODULES.get(name, name)) is None]
    if missing:
        raise ValueError(
            f'{owner}: needs {" and ".join(missing)}; run `pip install "gradbal[{extra}]"`.'
        )


def new_folder(owner: str, path: Path) -> None:
    """Make a folder if need be; raise ``ValueError`` unless a file can be written into it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=path):  # permissions alone do not tell, of a network drive say
            pass
    except OSError as error:
        raise ValueError(
            f"{owner}: `out` must be a folder that can be written, got {str(path)!r} "
            f"({error.strerror})."
        ) from None
