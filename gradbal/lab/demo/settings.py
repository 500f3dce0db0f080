"""What users may set, checked before anything is computed."""

from dataclasses import dataclass
from pathlib import Path

from gradbal._utils import checks
from gradbal.lab.checks import check_device, check_packages, check_rules, new_folder
from gradbal.lab.models.architectures import ARCHITECTURES, PLAIN

OWNER = "gradbal demo"
REFERENCE = "ew"  # always trained: step times are given relative to it
RULES_BY_DEFAULT = ("uw", "pcgrad", "cagrad", "nash_mtl", "upgrad")
SEARCH = "automtl"  # the architecture that is searched for, in a demo of its own
SEARCH_RULES = ("upgrad",)  # by default
ARCHS = (*ARCHITECTURES, SEARCH)
PACKAGES = ("scikit-learn", "matplotlib", "tqdm")


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
