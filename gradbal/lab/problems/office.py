"""Office-31 and Office-Home: the same things pictured in several ways, each way a task."""

from pathlib import Path

import torch
from torch import Tensor

from gradbal.lab.models.encoders import linear_head, resnet18
from gradbal.lab.problems import files, images
from gradbal.lab.problems.losses import cross_entropy
from gradbal.lab.problems.metrics import Accuracy
from gradbal.lab.problems.problem import Apart, Problem, Published, Stored, Task
from gradbal.lab.problems.splitting import shuffled

NAME = "office"
EXPECTED = "a folder with one folder for each task, and in these, or in their images, one per class"
SUFFIXES = (".jpg", ".jpeg", ".png")
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SOURCE = Published(
    source="Lin et al., DB-MTL, 2023",
    optimizer="Adam",
    lrs=(1e-4,),
    epochs=100,
    batch=64,
    reports="accuracy and Delta_p on test, split 60/20/20; weight decay 1e-5, ImageNet's weights",
)


def load(path: Path, *, seed: int = 0, side: int = 224) -> Problem:
    """Find the pictures; they are read when they are needed, by pillow.

    Args:
        path: Folder of amazon, dslr and webcam, or of Art, Clipart, Product and Real World.
        seed: Of the split, which the source does not say.
        side: Height and width of the pictures, in pixels.

    Raises:
        ValueError: If the folder is not as it must be, or if pillow is not installed.
    """
    files.package(NAME, "PIL.Image", "pillow")
    tasks = _folders(files.existing(NAME, path, EXPECTED))
    classes = {task: [place.name for place in _folders(task)] for task in tasks}
    if len(tasks) < 2 or not all(classes.values()) or len(set(map(tuple, classes.values()))) > 1:
        found = ", ".join(f"{task.name} with {len(some)}" for task, some in classes.items())
        raise ValueError(
            f"{NAME}: `path` must be {EXPECTED}, at least two tasks with the same classes, got "
            f"{found or 'none'}."
        )
    parts = {task.name: _cut(task, classes[task], seed, side) for task in tasks}
    train, validation, test = (
        Apart({task: cut[i] for task, cut in parts.items()}) for i in range(3)
    )
    head = linear_head(512, len(classes[tasks[0]]))
    return Problem(
        name=path.name,
        tasks=dict.fromkeys(parts, Task(cross_entropy, Accuracy, "accuracy")),
        train=train,
        validation=validation,
        test=test,
        stages=resnet18(),
        heads=dict.fromkeys(parts, head),
        batch=64,
        published=SOURCE,
    )


def _folders(path: Path) -> list[Path]:
    """Return the folders in a folder, or in its only one if that is called images."""
    found = sorted(place for place in path.glob("*") if place.is_dir())
    return _folders(found[0]) if [place.name for place in found] == ["images"] else found


def _cut(task: Path, classes: list[str], seed: int, side: int) -> list[Stored]:
    places = [
        (file, number)
        for number, place in enumerate(_folders(task))
        for file in sorted(place.iterdir())
        if file.suffix.lower() in SUFFIXES
    ]
    n = len(places)
    if n < 5:
        raise ValueError(
            f"{NAME}: {task.name!r} must have at least five pictures ({', '.join(SUFFIXES)}), "
            f"got {n}."
        )
    mean, spread = (torch.tensor(values)[:, None, None] for values in (MEAN, SPREAD))

    def read(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        file, label = places[number]
        return (images.read(NAME, file, side) - mean) / spread, {task.name: torch.tensor(label)}

    return [Stored(some, read) for some in shuffled(n, seed, round(0.6 * n), round(0.8 * n))]
