"""Reading what users point at; every surprise is told in one sentence."""

import gzip
import zlib
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np


def existing(owner: str, path: Path, expected: str) -> Path:
    """Return the path.

    Args:
        owner: The problem.
        path: What should be there.
        expected: What it should be, in words.

    Raises:
        ValueError: If there is nothing.
    """
    if not path.exists():
        raise ValueError(
            f"{owner}: `path` must be {expected}; there is no {path.name!r} in "
            f"{str(path.parent)!r}."
        )
    return path


def read_bytes(owner: str, path: Path, expected: str) -> bytes:
    """Read a file, unpacked if it is gzipped.

    Args:
        owner: The problem.
        path: The file.
        expected: What it should be, in words.

    Raises:
        ValueError: If there is no such file, or if it is damaged.
    """
    try:
        content = existing(owner, path, expected).read_bytes()
        return gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{owner}: `path` must be {expected}; {path.name!r} cannot be read ({error})."
        ) from error


def read_lines(owner: str, path: Path, expected: str) -> list[str]:
    """Read the lines of a text that are not empty; else as :func:`read_bytes`."""
    content = read_bytes(owner, path, expected)
    try:
        lines = [line for line in content.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        lines = []
    if not lines:
        raise ValueError(f"{owner}: `path` must be {expected}; {path.name!r} holds no text.")
    return lines


def read_array(owner: str, path: Path, shape: tuple[int | None, ...]) -> np.ndarray:
    """Read an array of numbers from an ``npy`` file, without unpickling anything.

    Args:
        owner: The problem.
        path: The file.
        shape: What the array must have; None stands for any number.

    Raises:
        ValueError: If it is no such file, or another shape.
    """
    try:
        array = np.asarray(np.load(path, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{owner}: {str(path)!r} must be an array of numbers in NumPy's format; it cannot be "
            "read. Copy the file again."
        ) from error
    if len(array.shape) != len(shape) or any(
        wanted not in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    ):
        listed = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{owner}: {str(path)!r} must have shape [{listed}], got {list(array.shape)}."
        )
    return array


def columns_of(owner: str, path: Path, found: Collection[str], needed: Collection[str]) -> None:
    """Raise ``ValueError`` unless a table has all columns that are needed."""
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{owner}: {path.name!r} must have the columns {', '.join(needed)}; it lacks "
            f"{', '.join(missing)}."
        )


def package(owner: str, module: str, name: str) -> Any:  # a module that may not be there
    """Import a module that only some problems need.

    Args:
        owner: The problem.
        module: The module.
        name: How its package is installed.

    Raises:
        ValueError: If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{owner}: needs {name}; run `pip install {name}`.") from error
