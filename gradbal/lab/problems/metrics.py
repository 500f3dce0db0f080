"""Figures that are exact however the examples are batched.

A metric is shown the batches of a split and then computes its figures from all labels alike. Code
that was published with the dense benchmarks takes means over batches instead, which makes depth and
normal figures depend, slightly, on the batch size.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradbal.lab.problems.losses import labelled

NAN = float("nan")


class Metric(ABC):
    """Accumulates what one or several figures of a task are computed from.

    Attributes:
        higher: For each figure whether a higher one is better.
    """

    higher: ClassVar[Mapping[str, bool]]

    @torch.no_grad()
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch in.

        Args:
            outputs: Of the head, shape ``[n, channels, ...]``.
            targets: Shape ``[n, ...]`` or ``[n, channels, ...]``; missing labels are left out.
        """
        self.add(*labelled(outputs, targets))

    @abstractmethod
    def add(self, outputs: Tensor, targets: Tensor) -> None:
        """Take rows in, as :func:`gradbal.lab.problems.losses.labelled` returns them."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the figures; NaN where no label determines one."""


class Mean(Metric):
    """Figures that are means over the labels."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(self.higher, 0.0)
        self.count = 0

    @abstractmethod
    def values(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Return for each figure its value at every row, shape ``[k]``."""

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        values = self.values(outputs, targets)
        for name, value in zip(self.higher, values, strict=True):
            self.sums[name] += value.double().sum().item()
        self.count += len(targets)

    def compute(self) -> dict[str, float]:
        return {name: _ratio(total, self.count) for name, total in self.sums.items()}


class Accuracy(Mean):
    """Share of examples whose class has the largest output, from 0 to 1."""

    higher: ClassVar[Mapping[str, bool]] = {"accuracy": True}

    def values(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return (outputs.argmax(dim=1) == targets,)


class Depth(Mean):
    """Mean absolute error of a depth, and the mean of this error over the true depth."""

    higher: ClassVar[Mapping[str, bool]] = {"abs_err": False, "rel_err": False}

    def values(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        error = (outputs[:, 0].double() - targets).abs()
        return error, error / targets


class Errors(Mean):
    """Mean absolute error and root mean squared error of a number.

    Args:
        scale: One unit of the outputs in the unit of the figures.
    """

    higher: ClassVar[Mapping[str, bool]] = {"mae": False, "rmse": False}

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def values(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        error = self.scale * (outputs[:, 0].double() - targets).abs()
        return error, error.square()

    def compute(self) -> dict[str, float]:
        mean = super().compute()
        return {"mae": mean["mae"], "rmse": mean["rmse"] ** 0.5}


class SquaredError(Mean):
    """Mean squared error of a number."""

    higher: ClassVar[Mapping[str, bool]] = {"mse": False}

    def values(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        return ((outputs[:, 0].double() - targets).square(),)


class RelativeError(Metric):
    r"""Error over that of predicting the training mean, for targets that have mean 0 there.

    .. math:: \sqrt{\sum_i (y_i - \hat y_i)^2 / \sum_i y_i^2}
    """

    higher: ClassVar[Mapping[str, bool]] = {"rrmse": False}

    def __init__(self) -> None:
        self.error, self.spread = 0.0, 0.0

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.error += (outputs[:, 0].double() - targets).square().sum().item()
        self.spread += targets.double().square().sum().item()

    def compute(self) -> dict[str, float]:
        return {"rrmse": _ratio(self.error, self.spread) ** 0.5}


class Segmentation(Metric):
    """Mean intersection over union, and accuracy over all pixels, from 0 to 1.

    A class that is neither there nor predicted has no union and is left out of the mean.

    Args:
        classes: Their number.
    """

    higher: ClassVar[Mapping[str, bool]] = {"miou": True, "pixel_accuracy": True}

    def __init__(self, classes: int) -> None:
        self.counts = torch.zeros(classes, classes, dtype=torch.int64)  # true, predicted

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        n = len(self.counts)
        pairs = n * targets + outputs.argmax(dim=1)
        self.counts += pairs.bincount(minlength=n * n).view(n, n).cpu()

    def compute(self) -> dict[str, float]:
        right, seen = self.counts.diagonal(), self.counts.sum(dim=1)
        union = seen + self.counts.sum(dim=0) - right
        shares = (right / union)[union > 0].double()
        accuracy = _ratio(right.sum().item(), seen.sum().item())
        return {"miou": shares.mean().item(), "pixel_accuracy": accuracy}


class Normals(Metric):
    """Angles between vectors, in degrees: mean, median (the lower one), shares within a bound.

    All angles are kept, 4 bytes for each, because their median needs them.
    """

    higher: ClassVar[Mapping[str, bool]] = {
        "mean": False,
        "median": False,
        "within_11.25": True,
        "within_22.5": True,
        "within_30": True,
    }

    def __init__(self) -> None:
        self.angles: list[Tensor] = []

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        cosines = F.cosine_similarity(outputs.double(), targets.double()).clamp(-1, 1)
        self.angles.append(cosines.acos().rad2deg().float().cpu())

    def compute(self) -> dict[str, float]:
        angles = torch.cat(self.angles) if self.angles else torch.empty(0)
        if not len(angles):
            return dict.fromkeys(self.higher, NAN)
        shares = {
            f"within_{bound:g}": (angles < bound).double().mean().item()
            for bound in (11.25, 22.5, 30)
        }
        mean = angles.double().mean().item()
        return {"mean": mean, "median": angles.median().item(), **shares}


class Collected(Metric):
    """One figure that scikit-learn computes from all outputs and answers, which are collected."""

    def __init__(self) -> None:
        self.batches = [(torch.empty(0).double(), torch.empty(0).bool())]

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        self.batches.append((outputs[:, 0].double().cpu(), (targets > 0).cpu()))

    @abstractmethod
    def figure(self, answers: np.ndarray, outputs: np.ndarray) -> float:
        """Return the figure of at least one label."""

    def compute(self) -> dict[str, float]:
        (name,) = self.higher
        outputs, answers = (torch.cat(parts).numpy() for parts in zip(*self.batches, strict=True))
        return {name: self.figure(answers, outputs) if len(answers) else NAN}


class F1(Collected):
    """Harmonic mean of precision and recall of yes, which is an output above 0; 0 without a hit."""

    higher: ClassVar[Mapping[str, bool]] = {"f1": True}

    def figure(self, answers: np.ndarray, outputs: np.ndarray) -> float:
        from sklearn.metrics import f1_score

        return float(f1_score(answers, outputs > 0, zero_division=NAN))


class AUC(Collected):
    """Chance that a positive example has the larger output than a negative one; ties count half."""

    higher: ClassVar[Mapping[str, bool]] = {"auc": True}

    def figure(self, answers: np.ndarray, outputs: np.ndarray) -> float:
        from sklearn.metrics import roc_auc_score

        known = 0 < answers.sum() < len(answers) and np.isfinite(outputs).all()
        return float(roc_auc_score(answers, outputs)) if known else NAN


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else NAN
