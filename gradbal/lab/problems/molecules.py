"""Molecules as vectors, from the text that names them, without a package of chemistry."""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from gradbal.lab.models.encoders import linear_head, mlp
from gradbal.lab.problems import files
from gradbal.lab.problems.problem import Examples, Problem, Published, Task

WIDTH, LONGEST = 1024, 5
HIDDEN = 256  # width of the layers of the network
EXPECTED = "a CSV file, plain or gzipped, with a column smiles and one column for each task"


def read(owner: str, path: Path, tasks: Collection[str]) -> tuple[Tensor, Tensor]:
    """Read a table of molecules.

    Args:
        owner: The problem.
        path: The file.
        tasks: Columns of targets.

    Returns:
        Inputs, shape ``[n, 1024]``, and targets, shape ``[n, tasks]``, NaN where a field is empty.

    Raises:
        ValueError: If the file is not as it must be.
    """
    table = csv.DictReader(files.read_lines(owner, path, EXPECTED))
    files.columns_of(owner, path, table.fieldnames or (), ("smiles", *tasks))
    inputs, targets = [], []
    for number, row in enumerate(table, 2):
        try:
            targets.append([float("nan" if row[task] == "" else row[task]) for task in tasks])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{owner}: {path.name!r} must have a number or nothing in every field of a task; "
                f"line {number} does not."
            ) from error
        inputs.append(fingerprint(row["smiles"]))
    if not inputs:
        raise ValueError(f"{owner}: {path.name!r} must have at least one row.")
    return torch.from_numpy(np.stack(inputs)), torch.tensor(targets)


def problem(
    name: str,
    examples: Examples,
    parts: Sequence[Tensor],
    tasks: Mapping[str, Task],
    published: Published,
) -> Problem:
    """Return a problem with an MLP that reads the counts, and a linear head for each task.

    Args:
        name: Of the problem.
        examples: All molecules.
        parts: Numbers of those for training, validation and test.
        tasks: What is learned.
        published: Protocol and figures of a paper.
    """
    train, validation, test = map(examples.take, parts)
    return Problem(
        name=name,
        tasks=tasks,
        train=train,
        validation=validation,
        test=test,
        stages=mlp(examples.x.shape[1], HIDDEN, HIDDEN, HIDDEN),
        heads=dict.fromkeys(tasks, linear_head(HIDDEN, 1)),
        batch=64,
        published=published,
    )


def fingerprint(smiles: str) -> np.ndarray:
    """Count the pieces of up to five characters by the remainder of their checksum.

    Args:
        smiles: The molecule.

    Returns:
        Logarithms of one plus the counts, shape ``[1024]``.
    """
    text = smiles.encode()
    places = [
        crc32(text[start : start + length]) % WIDTH
        for length in range(1, LONGEST + 1)
        for start in range(len(text) - length + 1)
    ]
    counts = np.bincount(np.array(places, dtype=np.int64), minlength=WIDTH)
    return np.log1p(counts).astype(np.float32)
