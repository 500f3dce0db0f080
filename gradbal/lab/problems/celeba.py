"""CelebA: forty yes-or-no attributes of a face."""

from pathlib import Path

import torch
from torch import Tensor

from gradbal.lab.models.encoders import cnn, linear_head
from gradbal.lab.problems import files, images
from gradbal.lab.problems.losses import binary_cross_entropy
from gradbal.lab.problems.metrics import F1
from gradbal.lab.problems.problem import Problem, Published, Stored, Task

NAME, SIDE = "celeba", 64
ATTRIBUTES, PARTITION, PICTURES = (
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
    "img_align_celeba",
)
EXPECTED = f"a folder with {ATTRIBUTES}, {PARTITION} and the folder {PICTURES}"
SOURCE = Published(
    source="Liu et al., FAMO, NeurIPS 2023",
    optimizer="Adam",
    epochs=15,
    batch=256,
    reports="Delta_m over F1 of the 40 attributes",
)


def load(path: Path, *, seed: int = 0) -> Problem:
    """Read the attributes; pictures are read when they are needed, by pillow.

    Args:
        path: Folder with the two lists and the pictures, or with Anno, Eval and Img that have them.
        seed: Draws nothing here: the split is published.

    Raises:
        ValueError: If a file is missing or not as it must be, or if pillow is not installed.
    """
    files.package(NAME, "PIL.Image", "pillow")
    attributes, partition, pictures = (
        _place(path, folder, name)
        for folder, name in (("Anno", ATTRIBUTES), ("Eval", PARTITION), ("Img", PICTURES))
    )
    names, tasks, answers = _attributes(attributes)
    parts = _parts(partition, names)

    def read(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = images.read(NAME, pictures / names[number], SIDE)
        return image, dict(zip(tasks, answers[number].float(), strict=True))

    train, validation, test = (
        Stored((parts == part).nonzero().flatten(), read) for part in range(3)
    )
    return Problem(
        name=NAME,
        tasks=dict.fromkeys(tasks, Task(binary_cross_entropy, F1, "f1")),
        train=train,
        validation=validation,
        test=test,
        stages=cnn(),
        heads=dict.fromkeys(tasks, linear_head(512, 1)),
        batch=256,
        published=SOURCE,
    )


def _place(path: Path, folder: str, name: str) -> Path:
    inside = path / folder / name
    return inside if inside.exists() else files.existing(NAME, path / name, EXPECTED)


def _attributes(path: Path) -> tuple[list[str], list[str], Tensor]:
    """Return names of pictures, names of attributes, and for each picture what it has, in bytes."""
    _, *lines = files.read_lines(NAME, path, EXPECTED)
    if len(lines) < 2:
        raise ValueError(
            f"{NAME}: `path` must be {EXPECTED}; {path.name!r} has no line for a picture."
        )
    tasks = lines.pop(0).split()
    names, answers = [], []
    for line in lines:
        name, *values = line.split()
        if len(values) != len(tasks) or not {"1", "-1"}.issuperset(values):
            raise ValueError(
                f"{NAME}: {path.name!r} must have 1 or -1 for each of the {len(tasks)} attributes; "
                f"the line of {name!r} does not."
            )
        names.append(name)
        answers.append(bytes(value == "1" for value in values))
    table = torch.frombuffer(bytearray().join(answers), dtype=torch.uint8)
    return names, tasks, table.view(len(names), len(tasks))


def _parts(path: Path, names: list[str]) -> Tensor:
    """Return for each picture 0 for training, 1 for validation, 2 for test."""
    part_of = {}
    for line in files.read_lines(NAME, path, EXPECTED):
        name, _, part = line.partition(" ")
        part_of[name] = part.strip()
    for name in names:
        if part_of.get(name) not in ("0", "1", "2"):
            raise ValueError(
                f"{NAME}: {path.name!r} must have 0, 1 or 2 for every picture; it has none of them "
                f"for {name!r}."
            )
    return torch.tensor([int(part_of[name]) for name in names])
