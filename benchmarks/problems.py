"""Two multi-task problems from the data that scikit-learn brings along; nothing is downloaded."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import nn

from gradbal.lab.models.encoders import Factory, Stages, mlp
from gradbal.lab.problems.losses import cross_entropy, squared_error
from gradbal.lab.problems.metrics import Accuracy, SquaredError
from gradbal.lab.problems.problem import Examples, Problem, Task
from gradbal.lab.problems.splitting import shuffled

CLASS = Task(cross_entropy, Accuracy, "accuracy")
NUMBER = Task(squared_error, SquaredError, "mse")


def digits(seed: int, validation: bool = False, channels: int = 16) -> Problem:
    """Make pictures of two overlapping digits; read the left one, the right one and their sum.

    A canvas of 8 x 13 pixels holds two of scikit-learn's 8 x 8 digits, the right one 5 pixels
    further right; the brighter pixel wins. No digit occurs in two splits. The sum is standardised
    by the mean and deviation of training.

    Args:
        seed: Of the split and of the pairs.
        validation: Make pictures for validation of a quarter of the digits for training.
        channels: Of the second and third convolution; the first has half as many.
    """
    data = load_digits()
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(data.images))
    train, chosen, test = (
        _pairs(data.images[some] / 16, data.target[some], n if len(some) else 0, draw)
        for some, n in zip(np.split(order, _cuts(1200, validation)), (1500, 600, 600), strict=True)
    )
    known = (train.y["left"] + train.y["right"]).double()
    for split in (train, chosen, test):
        total = split.y["left"] + split.y["right"]
        split.y["sum"] = (total - known.mean()).div(known.std()).float()
    return Problem(
        name="digits",
        tasks={"left": CLASS, "right": CLASS, "sum": NUMBER},
        train=train,
        validation=chosen,
        test=test,
        stages=cnn(channels // 2, channels, channels),
        heads={t: _head(channels * 2 * 4, n) for t, n in (("left", 10), ("right", 10), ("sum", 1))},
        batch=64,
    )


def tumours(seed: int, validation: bool = False, width: int = 32) -> Problem:
    """Predict a diagnosis and three extremes of a tumour's cell nuclei from their mean features.

    Of the 30 columns of the breast cancer data the inputs are the ten means over the nuclei in a
    picture. Tasks are the diagnosis and three of the columns called "worst", the mean of the three
    largest nuclei: texture, smoothness, symmetry. They come from the same pictures, so the inputs
    say much about them but do not determine them. A quarter of the patients is for testing; inputs
    and numbers are standardised by the mean and deviation of those for training.

    Args:
        seed: Of the split.
        validation: Keep a quarter of the others for validation.
        width: Of the three layers.
    """
    data = load_breast_cancer()
    names = list(data.feature_names)
    parts = shuffled(len(data.data), seed, *_cuts(len(data.data) * 3 // 4, validation))
    known = data.data[parts[0].numpy()]
    columns = torch.tensor((data.data - known.mean(0)) / known.std(0), dtype=torch.float32)
    targets = {
        "diagnosis": torch.tensor(data.target),
        **{t: columns[:, names.index(f"worst {t}")] for t in ("texture", "smoothness", "symmetry")},
    }
    train, chosen, test = map(Examples(columns[:, :10], targets).take, parts)
    return Problem(
        name="tumours",
        tasks={t: CLASS if t == "diagnosis" else NUMBER for t in targets},
        train=train,
        validation=chosen,
        test=test,
        stages=mlp(10, width, width, width),
        heads={t: _head(width, 2 if t == "diagnosis" else 1) for t in targets},
        batch=16,
    )


def _cuts(n_known: int, validation: bool) -> tuple[int, int]:
    """Return where validation and test begin."""
    return n_known * 3 // 4 if validation else n_known, n_known


def _head(inputs: int, outputs: int) -> Factory:
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


PROBLEMS: dict[str, Callable[..., Problem]] = {"digits": digits, "tumours": tumours}


@lru_cache
def problem(name: str, seed: int) -> Problem:
    """Return a problem, split by the seed."""
    return PROBLEMS[name](seed)


def cnn(first: int, second: int, third: int) -> Stages:
    """Return the three stages of an encoder of pictures; the last two halve their size."""
    return (
        lambda: nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(second, third, 3, stride=2, padding=1), nn.ReLU()),
    )


def _pairs(images: np.ndarray, labels: np.ndarray, n: int, draw: np.random.Generator) -> Examples:
    """Draw pictures of two digits."""
    left, right = draw.integers(max(len(images), 1), size=(2, n))
    canvas = np.zeros((n, 1, 8, 13))
    canvas[:, 0, :, :8] = images[left]
    canvas[:, 0, :, 5:] = np.maximum(canvas[:, 0, :, 5:], images[right])
    y = {"left": torch.tensor(labels[left]), "right": torch.tensor(labels[right])}
    return Examples(torch.tensor(canvas, dtype=torch.float32), y)
