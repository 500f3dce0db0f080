"""Regression with several targets, from an ARFF file as the Mulan collection has them."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.problems import Problem, Split, Task, divide, mlp
from gradbal.lab.problems.arff import read_columns
from gradbal.lab.problems.splitting import in_deviations, standardised

BATCH, WIDTH = 32, 512


def mulan(path: Path, n_targets: int, seed: int, validation: bool = False) -> Problem:
    """Predict the last columns of a file from the others.

    Two thirds of the rows are for training; all columns are standardised by their mean and
    deviation. A column that is constant there says nothing and is left out of the inputs.

    Args:
        path: An ARFF file without gaps; words become one column of 0 and 1 each.
        n_targets: How many of the last columns are targets.
        seed: Of the split.
        validation: Score on a part of the training rows, see ``problems.divide``.

    Raises:
        ValueError: If the file is not as it must be.
    """
    columns = torch.from_numpy(read_columns(path))
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
    known = torch.from_numpy(parts[0])
    x = standardised(columns[:, :-n_targets], known)
    names = [f"target_{number}" for number in range(n_targets)]
    y, _ = in_deviations(path.name, names, columns[:, -n_targets:], known)
    train, test = (
        Split(x[some], {name: target[some] for name, target in y.items()}) for some in parts
    )
    tasks = dict.fromkeys(names, Task())
    return Problem(tasks, train, test, BATCH, mlp(x.shape[1], WIDTH), WIDTH)
