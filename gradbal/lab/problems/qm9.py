"""QM9: eleven properties of small molecules, read by PyTorch Geometric."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradbal.lab.models.encoders import linear_head
from gradbal.lab.models.message_passing import ATOM, BONDS, MessagePassing
from gradbal.lab.problems import files
from gradbal.lab.problems.losses import squared_error
from gradbal.lab.problems.metrics import Errors
from gradbal.lab.problems.problem import Problem, Published, Stored, Task
from gradbal.lab.problems.splitting import in_deviations, shuffled

NAME = "qm9"
COLUMNS = {
    **{"mu": 0, "alpha": 1, "homo": 2, "lumo": 3, "r2": 5, "zpve": 6},
    **{"u0": 12, "u": 13, "h": 14, "g": 15, "cv": 11},
}
IN_MILLI = ("homo", "lumo", "zpve", "u0", "u", "h", "g")  # energies: read in eV, reported in meV
SOURCE = Published(
    source="Navon et al., Nash-MTL, ICML 2022",
    optimizer="Adam",
    lrs=(1e-3, 5e-4, 1e-4),
    epochs=300,
    batch=120,
    schedule="times 0.7 after 5 epochs without a better Delta_m on validation",
    reports="Delta_m over eleven MAE on test, epoch of the best Delta_m on validation, 3 seeds",
)


def load(path: Path, *, seed: int = 0, sizes: tuple[int, int] = (10_000, 10_000)) -> Problem:
    """Read the data set that PyTorch Geometric has made in a folder.

    Args:
        path: The ``root`` of ``torch_geometric.datasets.QM9``, with its folder raw.
        seed: Of the split.
        sizes: Molecules for validation and test; all others are for training.

    Raises:
        ValueError: If there is no such folder, if it cannot be read or has too few molecules, or
            if PyTorch Geometric is not installed.
    """
    datasets = files.package(NAME, "torch_geometric.datasets", "torch_geometric")
    if not any(path.glob("raw/*")):
        raise ValueError(
            f"{NAME}: `path` must be the root of PyTorch Geometric's QM9, a folder that has its "
            f"files in raw, got {str(path)!r}; nothing is downloaded."
        )
    try:
        molecules = datasets.QM9(str(path))
    except Exception as error:  # whatever it stumbled over
        raise ValueError(
            f"{NAME}: PyTorch Geometric cannot read its QM9 in {str(path)!r} ({error})."
        ) from error
    n = len(molecules)
    if n <= sum(sizes):
        raise ValueError(
            f"{NAME}: `sizes` must leave molecules for training; there are {n}, and {sum(sizes)} "
            "are for validation and test."
        )
    train, validation, test = shuffled(n, seed, n - sum(sizes), n - sizes[1])
    facts = [(molecule.y, len(molecule.x)) for molecule in molecules]
    values = torch.cat([targets for targets, _ in facts])[:, list(COLUMNS.values())]
    y, units = in_deviations(NAME, list(COLUMNS), values, train)
    largest = max(count for _, count in facts)

    def read(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        targets = {task: values[number] for task, values in y.items()}
        return packed(molecules[number], largest), targets

    scales = {task: 1e3 * unit if task in IN_MILLI else unit for task, unit in units.items()}
    return Problem(
        name=NAME,
        tasks={
            task: Task(squared_error, partial(Errors, scale), "mae")
            for task, scale in scales.items()
        },
        train=Stored(train, read),
        validation=Stored(validation, read),
        test=Stored(test, read),
        stages=(
            lambda: MessagePassing(64, 3),
            lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU()),
        ),
        heads=dict.fromkeys(COLUMNS, linear_head(64, 1)),
        batch=120,
        published=SOURCE,
    )


def packed(molecule: Any, size: int) -> Tensor:
    """Write a molecule into one tensor, as :class:`MessagePassing` reads it.

    Args:
        molecule: Of PyTorch Geometric: ``x``, ``pos``, ``edge_index`` and ``edge_attr``.
        size: Atoms of the largest molecule.

    Returns:
        Shape ``[size, 14 + 4 size]``: features and place of each atom, then its bonds with all.
    """
    n = len(molecule.x)
    atoms, bonds = torch.zeros(size, ATOM), torch.zeros(size, size, BONDS)
    atoms[:n] = torch.cat([molecule.x, molecule.pos], dim=1)
    source, target = molecule.edge_index
    bonds[source, target] = molecule.edge_attr
    return torch.cat([atoms, bonds.flatten(1)], dim=1)
