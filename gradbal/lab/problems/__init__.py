"""The problems, one module each; ``load`` of a module reads it from where the user has it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gradbal._utils.checks import did_you_mean
from gradbal.lab.problems import (
    celeba,
    census,
    cityscapes,
    mulan,
    multi_mnist,
    nyuv2,
    office,
    qm8,
    qm9,
    tox21,
    two_digits,
)
from gradbal.lab.problems.problem import Problem

WITH_PATH: dict[str, Callable[..., Problem]] = {
    "multi_mnist": multi_mnist.load,
    "mulan": mulan.load,
    "census": census.load,
    "tox21": tox21.load,
    "qm8": qm8.load,
    "nyuv2": nyuv2.load,
    "cityscapes": cityscapes.load,
    "office": office.load,
    "celeba": celeba.load,
    "qm9": qm9.load,
}
PROBLEMS = ("two_digits", *WITH_PATH)


def check_problem(name: str, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless the problem is one of those that are known."""
    if name not in known:
        raise ValueError(
            f"gradbal compare: unknown problem {name!r}.{did_you_mean(name, known)} "
            f"There are {', '.join(known)}."
        )


def load(
    name: str,
    path: Path | None = None,
    *,
    seed: int = 0,
    **options: Any,  # each problem's own
) -> Problem:
    """Return a problem.

    Args:
        name: One of ``PROBLEMS``.
        path: Where its files are; None for those that need none.
        seed: Of what a loader draws, such as the split; a published split is not drawn.
        options: As the ``load`` of the problem's module has them.

    Raises:
        ValueError: If there is no such problem, if it needs a path, or if what the path leads to is
            not as it must be.
    """
    check_problem(name, PROBLEMS)
    if name not in WITH_PATH:
        return two_digits.load(seed=seed, **options)
    if path is None:
        raise ValueError(
            f"{name}: `path` must say where its files are, got none; they are not downloaded."
        )
    return WITH_PATH[name](Path(path), seed=seed, **options)
