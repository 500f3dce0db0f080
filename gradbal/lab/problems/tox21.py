"""Tox21: which of twelve tests a molecule fails; many were not made."""

from pathlib import Path

from gradbal.lab.problems import molecules
from gradbal.lab.problems.losses import binary_cross_entropy
from gradbal.lab.problems.metrics import AUC
from gradbal.lab.problems.problem import Examples, Problem, Published, Task
from gradbal.lab.problems.splitting import tenths

TASKS = (
    *("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma"),
    *("SR-ARE", "SR-ATAD5", "SR-HSE", "SR-MMP", "SR-p53"),
)
SOURCE = Published(
    source="chemprop, 2019",
    reports="mean AUC of the tasks, random split 80/10/10, 3 runs: 0.851 +- 0.015, graph network",
)


def load(path: Path, *, seed: int = 0) -> Problem:
    """Read MoleculeNet's table; its molecules become counts of the pieces of their text.

    Args:
        path: The file tox21.csv, plain or gzipped.
        seed: Of the split.

    Raises:
        ValueError: If the file is not as it must be.
    """
    x, y = molecules.read("tox21", path, TASKS)
    examples = Examples(x, dict(zip(TASKS, y.T, strict=True)))
    tasks = dict.fromkeys(TASKS, Task(binary_cross_entropy, AUC, "auc"))
    return molecules.problem("tox21", examples, tenths(len(x), seed), tasks, SOURCE)
