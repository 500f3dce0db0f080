"""Multi-target regression from a file of the Mulan collection: one task for each target."""

from pathlib import Path

import torch

from gradbal.lab.models.encoders import linear_head, mlp
from gradbal.lab.problems.arff import read_columns
from gradbal.lab.problems.losses import squared_error
from gradbal.lab.problems.metrics import RelativeError
from gradbal.lab.problems.problem import Examples, Problem, Published, Task
from gradbal.lab.problems.splitting import in_deviations, shuffled, standardised

TARGETS = {
    **{"andro": 6, "atp1d": 6, "atp7d": 6, "edm": 2, "enb": 2, "jura": 3, "oes10": 16, "oes97": 16},
    **{"rf1": 8, "rf2": 8, "scm1d": 16, "scm20d": 16, "sf1": 3, "sf2": 3, "slump": 3, "wq": 14},
}  # how many of the last columns are targets
WIDTH = 128
SOURCE = Published(
    source="Spyromitros-Xioufis et al., Machine Learning 104, 2016",
    reports="aRRMSE, the mean of rrmse over the targets, by cross-validation; no neural network",
)


def load(
    path: Path,
    *,
    seed: int = 0,
    targets: int | None = None,
    validation: bool = True,
    width: int = WIDTH,
) -> Problem:
    """Predict the last columns of a file from the others.

    Two thirds of the rows are for training and validation, three parts and one. Inputs and targets
    are in units of their deviation over the rows for training; inputs that are constant there say
    nothing and are left out. Words become one column of 0 and 1 each.

    Args:
        path: An ARFF file without gaps.
        seed: Of the split.
        targets: How many columns are targets; known for the files of the collection.
        validation: Without it, the rows for validation are for training.
        width: Of the three layers.

    Raises:
        ValueError: If the file is not as it must be, or a target is constant.
    """
    columns = torch.from_numpy(read_columns(path))
    n_rows, n_columns = columns.shape
    if targets is None:
        targets = TARGETS.get(path.stem, 0)
    if not 0 < targets < n_columns:
        raise ValueError(
            f"{path.name}: `targets` must be from 1 to {n_columns - 1}, its columns less one, "
            f"got {targets or 'none'}."
        )
    known = round(2 * n_rows / 3)
    parts = shuffled(n_rows, seed, known * 3 // 4 if validation else known, known)
    x = standardised(columns[:, :-targets], parts[0])
    names = [f"target_{number}" for number in range(targets)]
    y, _ = in_deviations(path.name, names, columns[:, -targets:], parts[0])
    train, chosen, test = map(Examples(x, y).take, parts)
    return Problem(
        name=path.stem,
        tasks=dict.fromkeys(names, Task(squared_error, RelativeError, "rrmse")),
        train=train,
        validation=chosen,
        test=test,
        stages=mlp(x.shape[1], width, width, width),
        heads=dict.fromkeys(names, linear_head(width, 1)),
        batch=32,
        published=SOURCE,
    )
