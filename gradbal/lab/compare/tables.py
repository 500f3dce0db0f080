"""Tables in Markdown, and how they were made."""

import os
import platform
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version

from gradbal import __version__

Line = Sequence[str]


def made_by(command: str, *packages: str, device: str = "cpu") -> str:
    """Write how a table was made, and on what machine.

    Args:
        command: What was run.
        packages: Others whose versions matter.
        device: Where it was run, as torch names it.
    """
    found = {"gradbal": __version__, **{package: version(package) for package in packages}}
    versions = ", ".join(f"{package} {number}" for package, number in found.items())
    where = "CPU only" if device == "cpu" else device
    return f"""\
Made by `{command}` on {date.today()}: {os.cpu_count()} cores, {where} ({platform.machine()}),
Python {platform.python_version()}, {versions}."""
