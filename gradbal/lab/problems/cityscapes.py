"""Cityscapes as MTAN's authors preprocessed it: 7 classes and inverse depth of street scenes."""

from functools import partial
from pathlib import Path

from gradbal.lab.models.encoders import pixel_head, segnet
from gradbal.lab.problems import dense
from gradbal.lab.problems.losses import absolute_error, cross_entropy
from gradbal.lab.problems.metrics import Depth, Segmentation
from gradbal.lab.problems.problem import Problem, Published, Task

CLASSES = 7
KINDS: dense.Kinds = {"image": (3,), "label": (), "depth": (1,)}
SOURCE = Published(
    source="Navon et al., Nash-MTL, ICML 2022",
    optimizer="Adam",
    lrs=(1e-4,),
    epochs=200,
    batch=8,
    schedule="halved after 100 epochs",
    reports="Delta_m over four figures on val, mean of the last 10 epochs, 3 seeds",
)


def load(path: Path, *, seed: int = 0, validation: float = 0.1) -> Problem:
    """Find the arrays; they are read when they are needed.

    Args:
        path: Folder with train and val, each with image, label and depth, 0.npy and so on.
        seed: Draws the pictures for validation.
        validation: Share of the training pictures that is for validation.

    Raises:
        ValueError: If a folder or an array is missing.
    """
    train, chosen, test = dense.splits("cityscapes", path, KINDS, CLASSES, seed, validation)
    return Problem(
        name="cityscapes",
        tasks={
            "segmentation": Task(cross_entropy, partial(Segmentation, CLASSES), "miou"),
            "depth": Task(absolute_error, Depth, "abs_err"),
        },
        train=train,
        validation=chosen,
        test=test,
        stages=segnet(),
        heads={"segmentation": pixel_head(CLASSES), "depth": pixel_head(1)},
        batch=8,
        published=SOURCE,
    )
