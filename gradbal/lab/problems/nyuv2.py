"""NYUv2 as MTAN's authors preprocessed it: 13 classes, depth and normals of indoor scenes."""

from functools import partial
from pathlib import Path

from gradbal._utils import checks
from gradbal.lab.models.encoders import deeplab_head, dilated_resnet50, pixel_head, segnet
from gradbal.lab.problems import dense
from gradbal.lab.problems.losses import absolute_error, cosine, cross_entropy
from gradbal.lab.problems.metrics import Depth, Normals, Segmentation
from gradbal.lab.problems.problem import Problem, Published, Task

CLASSES = 13
KINDS: dense.Kinds = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
OUTPUTS = {"segmentation": CLASSES, "depth": 1, "normal": 3}
NETWORKS = {"segnet": (segnet, pixel_head, 2), "resnet50": (dilated_resnet50, deeplab_head, 8)}
SOURCES = {
    "segnet": Published(
        source="Navon et al., Nash-MTL, ICML 2022",
        optimizer="Adam",
        lrs=(1e-4,),
        epochs=200,
        batch=2,
        schedule="halved after 100 epochs",
        reports="Delta_m over nine figures on val, mean of the last 10 epochs, 3 seeds",
    ),
    "resnet50": Published(
        source="Lin and Zhang, LibMTL, JMLR 2023, the NYUv2 example",
        optimizer="Adam",
        lrs=(1e-4,),
        epochs=200,
        batch=8,
        schedule="halved after 100 epochs",
        reports="nine figures on val after every epoch",
    ),
}


def load(path: Path, *, seed: int = 0, validation: float = 0.1, network: str = "segnet") -> Problem:
    """Find the arrays; they are read when they are needed.

    Args:
        path: Folder with train and val, each with image, label, depth and normal, 0.npy and so on.
        seed: Draws the pictures for validation.
        validation: Share of the training pictures that is for validation.
        network: ``"segnet"``, as MTAN's authors; or ``"resnet50"``, a dilated ResNet-50 with a head
            of DeepLabv3 (ASPP) for each task, as LibMTL. Sides of pictures are then multiples of 8,
            and no batch for training may hold a single picture.

    Raises:
        ValueError: If a folder or an array is missing, or the network is another.
    """
    checks.one_of("nyuv2", NETWORKS, network=network)
    encoder, head, batch = NETWORKS[network]
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
        stages=encoder(),
        heads={task: head(outputs) for task, outputs in OUTPUTS.items()},
        batch=batch,
        published=SOURCES[network],
    )
