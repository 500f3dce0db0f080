"""Two multi-task problems from the data that scikit-learn brings along; nothing is downloaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional

Factory = Callable[[], nn.Module]
Stages = tuple[Factory, Factory, Factory]


@dataclass(frozen=True)
class Task:
    """What one head learns: a class by cross-entropy, or a standardised number by squared error.

    Args:
        classes: Number of classes; 0 for a number.
    """

    classes: int = 0

    @property
    def higher(self) -> bool:
        """Whether a higher score is better."""
        return self.classes > 0

    @property
    def metric(self) -> str:
        return "accuracy" if self.classes else "MSE"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.classes:
            return functional.cross_entropy(output, target)
        return functional.mse_loss(output.squeeze(-1), target)

    def score(self, output: Tensor, target: Tensor) -> float:
        if self.classes:
            return float((output.argmax(-1) == target).double().mean())
        return float(functional.mse_loss(output.squeeze(-1), target))


@dataclass(frozen=True)
class Split:
    """Inputs, shape ``[n, ...]``, and targets by task, shape ``[n]`` each."""

    x: Tensor
    y: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A problem, and the parts from which models of it are made.

    Args:
        tasks: What is learned, by name.
        train: Examples to learn from.
        test: Examples to score on; nothing is chosen by them, unless they are for validation.
        batch: Examples per step.
        stages: Factories of the encoder's three stages.
        width: Numbers that a head reads.
    """

    tasks: dict[str, Task]
    train: Split
    test: Split
    batch: int
    stages: Stages
    width: int

    def head(self, task: str) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(self.width, self.tasks[task].classes or 1))


def digits(seed: int, validation: bool = False) -> Problem:
    """Make pictures of two overlapping digits; read the left one, the right one and their sum.

    A canvas of 8 x 13 pixels holds two of scikit-learn's 8 x 8 digits, the right one 5 pixels
    further right; the brighter pixel wins. Pictures for testing are made of digits that occur in no
    picture for training. The sum is standardised by the mean and deviation of training.
    """
    data = load_digits()
    draw = np.random.default_rng(seed)
    parts = divide(draw.permutation(len(data.images)), 1200, validation)
    train, test = (
        _pairs(data.images[some] / 16, data.target[some], n, draw)
        for some, n in zip(parts, (1500, 600), strict=True)
    )
    known = (train.y["left"] + train.y["right"]).double()
    for split in (train, test):
        total = split.y["left"] + split.y["right"]
        split.y["sum"] = (total - known.mean()).div(known.std()).float()
    return Problem(
        {"left": Task(10), "right": Task(10), "sum": Task()},
        train,
        test,
        batch=64,
        stages=cnn(8, 16, 16),
        width=16 * 2 * 4,
    )


def tumours(seed: int, validation: bool = False) -> Problem:
    """Predict a diagnosis and three extremes of a tumour's cell nuclei from their mean features.

    Of the 30 columns of the breast cancer data the inputs are the ten means over the nuclei in a
    picture. Tasks are the diagnosis and three of the columns called "worst", the mean of the three
    largest nuclei: texture, smoothness, symmetry. They come from the same pictures, so the inputs
    say much about them but do not determine them. A quarter of the patients is for testing; inputs
    and numbers are standardised by the mean and deviation of the others.
    """
    data = load_breast_cancer()
    names = list(data.feature_names)
    order = np.random.default_rng(seed).permutation(len(data.data))
    parts = divide(order, len(order) * 3 // 4, validation)
    known = data.data[parts[0]]
    columns = torch.tensor((data.data - known.mean(0)) / known.std(0), dtype=torch.float32)
    targets = {
        "diagnosis": torch.tensor(data.target),
        **{t: columns[:, names.index(f"worst {t}")] for t in ("texture", "smoothness", "symmetry")},
    }
    train, test = (
        Split(columns[some, :10], {task: y[some] for task, y in targets.items()}) for some in parts
    )
    return Problem(
        {"diagnosis": Task(2), "texture": Task(), "smoothness": Task(), "symmetry": Task()},
        train,
        test,
        batch=16,
        stages=mlp(10, 32),
        width=32,
    )


PROBLEMS: dict[str, Callable[..., Problem]] = {"digits": digits, "tumours": tumours}


@lru_cache
def problem(name: str, seed: int) -> Problem:
    """Return a problem, split into training and test examples by the seed."""
    return PROBLEMS[name](seed)


def divide(order: np.ndarray, n_known: int, validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Divide examples into those to learn from and those to score on.

    Args:
        order: All examples, shuffled.
        n_known: How many are for training.
        validation: Put those for testing aside, and score on the last quarter of the others.
    """
    if validation:
        order, n_known = order[:n_known], n_known * 3 // 4
    return order[:n_known], order[n_known:]


def mlp(n_inputs: int, width: int) -> Stages:
    """Return the three stages of an encoder of vectors."""
    return (
        lambda: nn.Sequential(nn.Linear(n_inputs, width), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU()),
    )


def cnn(first: int, second: int, third: int) -> Stages:
    """Return the three stages of an encoder of pictures; the last two halve their size."""
    return (
        lambda: nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(second, third, 3, stride=2, padding=1), nn.ReLU()),
    )


def _pairs(images: np.ndarray, labels: np.ndarray, n: int, draw: np.random.Generator) -> Split:
    """Draw pictures of two digits."""
    left, right = draw.integers(len(images), size=(2, n))
    canvas = np.zeros((n, 1, 8, 13))
    canvas[:, 0, :, :8] = images[left]
    canvas[:, 0, :, 5:] = np.maximum(canvas[:, 0, :, 5:], images[right])
    y = {"left": torch.tensor(labels[left]), "right": torch.tensor(labels[right])}
    return Split(torch.tensor(canvas, dtype=torch.float32), y)
