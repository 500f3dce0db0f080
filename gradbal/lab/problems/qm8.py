"""QM8: energies and strengths of a molecule's first two excitations, by three methods."""

from functools import partial
from pathlib import Path

from gradbal.lab.problems import molecules
from gradbal.lab.problems.losses import absolute_error
from gradbal.lab.problems.metrics import Errors
from gradbal.lab.problems.problem import Examples, Problem, Published, Task
from gradbal.lab.problems.splitting import in_deviations, tenths

TASKS = tuple(
    f"{what}-{how}" for how in ("CC2", "PBE0", "CAM") for what in ("E1", "E2", "f1", "f2")
)
SOURCE = Published(
    source="chemprop, 2019",
    reports="mean MAE of the tasks, random split 80/10/10, 3 runs: 0.008, graph network",
)


def load(path: Path, *, seed: int = 0) -> Problem:
    """Read MoleculeNet's table; its molecules become counts of the pieces of their text.

    Args:
        path: The file qm8.csv, plain or gzipped.
        seed: Of the split.

    Raises:
        ValueError: If the file is not as it must be.
    """
    x, values = molecules.read("qm8", path, TASKS)
    parts = tenths(len(x), seed)
    y, units = in_deviations("qm8", TASKS, values, parts[0])
    tasks = {
        name: Task(absolute_error, partial(Errors, unit), "mae") for name, unit in units.items()
    }
    return molecules.problem("qm8", Examples(x, y), parts, tasks, SOURCE)
