"""NYUv2 as MTAN's authors preprocessed it: 13 classes, depth and normals of indoor scenes."""

from functools import partial
from pathlib import Path

from gradbal.lab.models.encoders import pixel_head, segnet
from gradbal.lab.problems import dense
from gradbal.lab.problems.losses import absolute_error, cosine, cross_entropy
from gradbal.lab.problems.metrics import Depth, Normals, Segmentation
from gradbal.lab.problems.problem import Problem, Published, Task

CLASSES = 13
KINDS: dense.Kinds = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
SOURCE = Published(
    source="Navon et al., Nash-MTL, ICML 2022",
    optimizer="Adam",
    lrs=(1e-4,),
    epochs=200,
    batch=2,
    schedule="halved after 100 epochs",
    reports="Delta_m over nine figures on val, mean of the last 10 epochs, 3 seeds",
)


def load(path: Path, *, seed: int = 0, validation: float = 0.1) -> Problem:
    """Find the arrays; they are read when they are needed.

    Args:
        path: Folder with train and val, each with image, label, depth and normal, 0.npy and so on.
        seed: Draws the pictures for validation.
        validation: Share of the training pictures that is for validation.

    Raises:
        ValueError: If a folder or an array is missing.
    """
    train, chosen, test = dense.splits("nyuv2", path, KINDS, CLASSES, seed, validation)
    return Problem(
        name="nyuv2",
        tasks={
            "segmentation": Task(cross_entropy, partial(Segmentation, CLASSES), "miou"),
            "depth": Task(absolute_error, Depth, "abs_err"),
            "normal": Task(cosine, Normals, "mean"),
        },
        train=train,
        validation=chosen,
        test=test,
        stages=segnet(),
        heads={
            "segmentation": pixel_head(CLASSES),
            "depth": pixel_head(1),
            "normal": pixel_head(3),
        },
        batch=2,
        published=SOURCE,
    )
