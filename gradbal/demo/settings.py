"""What users may set, checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from gradbal import checks
from gradbal.checks import did_you_mean
from gradbal.demo.architectures import ARCHITECTURES, PLAIN
from gradbal.registry import RULES

OWNER = "gradbal demo"
REFERENCE = "ew"  # always trained: step times are given relative to it
RULES_BY_DEFAULT = ("uw", "pcgrad", "cagrad", "nash_mtl", "upgrad")
SEARCH = "automtl"  # the architecture that is searched for, in a demo of its own
SEARCH_RULES = ("upgrad",)  # by default
ARCHS = (*ARCHITECTURES, SEARCH)
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the demo.

    Args:
        rules: Registered names; ``ew`` is added where it is missing.
        arch: How the tasks share parameters, one of ``ARCHS``.
        epochs: Passes over the training pictures.
        seed: Seed of the pictures, the initial weights, the batches and the rules.
        device: Where to train, as torch names it.
        out: Folder for the two pictures; made if need be.

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
        """Make sure that training will not be in vain: packages are there, the folder is made.

        Raises:
            ValueError: If a package that only the demo needs is missing, or there is no folder.
        """
        missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
        if missing:
            raise ValueError(
                f'{OWNER}: needs {" and ".join(missing)}; run `pip install "gradbal[demo]"`.'
            )
        new_folder(OWNER, self.out)


def check_rules(owner: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` unless there are rules, and all are registered."""
    if not names:
        raise ValueError(f"{owner}: `rules` must name at least one rule.")
    for name in names:
        if name not in RULES:
            raise ValueError(
                f"{owner}: unknown rule {name!r}.{did_you_mean(name, RULES)} "
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


def new_folder(owner: str, path: Path) -> None:
    """Make a folder if need be; raise ``ValueError`` where there cannot be one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{owner}: `out` must be a folder that can be written, got {str(path)!r} "
            f"({error.strerror})."
        ) from None
