"""Regression with several targets, from an ARFF file as the Mulan collection has them."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.io import arff

from benchmarks.problems import Problem, Split, Task, divide, mlp

BATCH, WIDTH = 32, 512


def mulan(path: Path, n_targets: int, seed: int, validation: bool = False) -> Problem:
    """Predict the last columns of a file from the others.

    Two thirds of the rows are for training; all columns are standardised by their mean and
    deviation. A column that is constant there says nothing and is left out of the inputs.

    Args:
        path: An ARFF file of numbers only.
        n_targets: How many of the last columns are targets.
        seed: Of the split.
        validation: Score on a part of the training rows, see ``problems.divide``.

    Raises:
        ValueError: If the file is not as it must be.
    """
    columns = read_columns(path)
    n_rows, n_columns = columns.shape
    if not 0 < n_targets < n_columns:
        raise ValueError(
            f"{path.name}: `n_targets` must be from 1 to {n_columns - 1}, its columns less one, "
            f"got {n_targets}."
        )
    order = np.random.default_rng(seed).permutation(n_rows)
    parts = divide(order, round(2 * n_rows / 3), validation)
    if len(parts[0]) < BATCH:
        raise ValueError(
            f"{path.name}: {len(parts[0])} of {n_rows} rows are for training, and a batch needs "
            f"{BATCH}."
        )
    known = columns[parts[0]]
    spread = known.std(0)
    if not spread[-n_targets:].all():
        raise ValueError(f"{path.name}: a target is constant in the training part of seed {seed}.")
    varied = spread > 0
    values = torch.tensor((columns - known.mean(0))[:, varied] / spread[varied]).float()
    x, y = values[:, :-n_targets], values[:, -n_targets:]
    names = [f"target_{number}" for number in range(n_targets)]
    train, test = (Split(x[some], dict(zip(names, y[some].T, strict=True))) for some in parts)
    tasks = dict.fromkeys(names, Task())
    return Problem(tasks, train, test, BATCH, mlp(x.shape[1], WIDTH), WIDTH)


@lru_cache
def read_columns(path: Path) -> np.ndarray:
    """Read a file of numbers, shape ``[rows, columns]``.

    Raises:
        ValueError: If there is no such file, if it is no ARFF file, or if anything in it is not a
            finite number.
    """
    if not path.is_file():
        raise ValueError(f"{path.name}: there is no such file.")
    try:
        table, meta = arff.loadarff(path)
    except Exception as error:  # whatever the parser stumbled over
        raise ValueError(f"{path.name}: not an ARFF file of plain columns.") from error
    for name, kind in zip(meta.names(), meta.types(), strict=True):
        if kind != "numeric" or not np.isfinite(table[name]).all():
            what = "missing values" if kind == "numeric" else f"{kind} values"
            raise ValueError(f"{path.name}: column {name} has {what}; only numbers can be used.")
    return np.stack([table[name] for name in meta.names()], axis=1)
