"""Checks of settings that the commands share: rules, device, packages and the output folder."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

import torch

from gradbal._utils.checks import did_you_mean
from gradbal.rules._registry import rule_names

MODULES = {"scikit-learn": "sklearn"}  # of packages that are imported under another name


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
