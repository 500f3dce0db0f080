"""MultiMNIST: two digits of MNIST in one picture, one up on the left, one down on the right."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from gradbal.lab.models.encoders import lenet, linear_head
from gradbal.lab.problems import files
from gradbal.lab.problems.losses import cross_entropy
from gradbal.lab.problems.metrics import Accuracy
from gradbal.lab.problems.problem import Examples, Problem, Published, Task
from gradbal.lab.problems.splitting import shuffled

NAME = "multi_mnist"
EXPECTED = "a folder with t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, plain or gzipped (.gz)"
SIDE, CANVAS, SHIFT = 28, 36, 8  # pixels
SOURCE = Published(
    source="Sener and Koltun, NeurIPS 2018",
    reports="accuracy of both digits, 60,000 pairs, LeNet with two linear heads",
)


def load(
    path: Path, *, seed: int = 0, pairs: tuple[int, int, int] = (20_000, 2_000, 4_000)
) -> Problem:
    """Put digits together at random; no digit occurs in two splits.

    Where the folder has MNIST's training files as well, training and validation come from them,
    nine tenths and one, and test from the others. Otherwise the first 80 % of the digits are for
    training and validation, seven parts and one, and the rest for test.

    Args:
        path: Folder with MNIST's files.
        seed: Draws the digits for validation, and the pairs.
        pairs: Pictures for training, validation and test.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    images, labels = _digits(path, "t10k")
    if any(path.glob("train-images-idx3-ubyte*")):
        first, share = 0, 0.9
        known = _digits(path, "train")
    else:
        first, share = round(0.8 * len(images)), 7 / 8
        known = images[:first], labels[:first]
    learnt, chosen = shuffled(len(known[0]), seed, round(share * len(known[0])))
    generator = torch.Generator().manual_seed(seed)
    train, validation = (
        _overlaid(known[0][some], known[1][some], count, generator)
        for some, count in zip((learnt, chosen), pairs, strict=False)
    )
    test = _overlaid(images[first:], labels[first:], pairs[2], generator)
    return Problem(
        name=NAME,
        tasks=dict.fromkeys(("left", "right"), Task(cross_entropy, Accuracy, "accuracy")),
        train=train,
        validation=validation,
        test=test,
        stages=lenet(),
        heads=dict.fromkeys(("left", "right"), linear_head(50, 10)),
        batch=256,
        published=SOURCE,
    )


def _overlaid(images: Tensor, labels: Tensor, n: int, generator: Generator) -> Examples:
    """Put pairs of digits on a canvas, the brighter pixel wins, and shrink it to a digit's size."""
    left, right = torch.randint(len(images), (2, n), generator=generator)
    canvas = torch.zeros(n, 1, CANVAS, CANVAS, dtype=torch.uint8)
    canvas[:, 0, :SIDE, :SIDE] = images[left]
    corner = canvas[:, 0, SHIFT:, SHIFT:]
    torch.maximum(corner, images[right], out=corner)
    small = F.interpolate(canvas, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return Examples(small, {"left": labels[left], "right": labels[right]})


def _digits(path: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read pictures, shape ``[n, 28, 28]``, and their labels, shape ``[n]``."""
    images = _idx(path, f"{part}-images-idx3-ubyte", 3)
    labels = _idx(path, f"{part}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (SIDE, SIDE) or len(images) != len(labels) or labels.max() > 9:
        raise ValueError(
            f"{NAME}: pictures must have shape [{len(labels)}, {SIDE}, {SIDE}], one for each "
            f"label, and labels be 0 to 9; got {list(images.shape)} and labels up to "
            f"{labels.max()}."
        )
    return images, labels.long()


def _idx(path: Path, name: str, axes: int) -> Tensor:
    """Read bytes in the format of MNIST: 0, 0, 8, axes, then sizes, then the content."""
    file = path / name if (path / name).exists() else path / f"{name}.gz"
    content = files.read_bytes(NAME, file, EXPECTED)
    start = 4 + 4 * axes
    if content.startswith(bytes((0, 0, 8, axes))) and len(content) > start:
        sizes = np.frombuffer(content, ">u4", axes, offset=4).tolist()
        if len(content) == start + prod(sizes):
            values = np.frombuffer(content, np.uint8, offset=start)
            return torch.from_numpy(values.copy()).view(*sizes)  # a copy that may be written to
    raise ValueError(
        f"{NAME}: {file.name!r} must be bytes in the idx format with {axes} axes; it is not, or is "
        "cut off. Copy the file again."
    )
