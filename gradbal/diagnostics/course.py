"""A training in numbers, on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from gradbal.diagnostics.step import Step
from gradbal.step.record import StepRecord


@dataclass(frozen=True)
class Course:
    """What some steps were like; NaN stands for what there was not.

    Inner products are those that the rule saw: over shared parameters, or over a representation,
    chosen modules or a sketch. With several groups they are summed over groups.

    Attributes:
        tasks: Names of all m tasks that took part.
        steps: Numbers of the s steps, shape ``[s]``.
        seconds: Wall-clock time of each, shape ``[s]``.
        losses: Shape ``[s, m]``.
        weights: On the shared parameters, shape ``[s, m]``; with several groups their mean.
        grams: Inner products of task gradients, shape ``[s, m, m]``.
        slopes: Inner products of task gradients with the rule's direction, shape ``[s, m]``.
        squares: Squared length of this direction, shape ``[s]``.
        residuals: The worst that the rule's solver reports, shape ``[s]``.
    """

    tasks: tuple[str, ...]
    steps: Tensor
    seconds: Tensor
    losses: Tensor
    weights: Tensor
    grams: Tensor
    slopes: Tensor
    squares: Tensor
    residuals: Tensor

    @property
    def norms(self) -> Tensor:
        """Lengths of the task gradients, shape ``[s, m]``."""
        return self.grams.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Cosines between task gradients, shape ``[s, m, m]``."""
        return cosines(self.grams)

    @property
    def along_direction(self) -> Tensor:
        """Cosine of each task gradient with the direction, ``[s, m]``; below 0 the loss rises."""
        return self.slopes / (self.norms * self.squares.sqrt()[:, None])

    @property
    def along_sum(self) -> Tensor:
        """Cosine of each task gradient with the gradient of the summed loss, ``[s, m]``."""
        return self._products_with_sum / (self.norms * self._sum_squares.sqrt()[:, None])

    @property
    def cosine_to_sum(self) -> Tensor:
        """Cosine between the direction and the gradient of the summed loss, shape ``[s]``."""
        return self.slopes.nansum(dim=1) / (self.squares * self._sum_squares).sqrt()

    @property
    def length_to_sum(self) -> Tensor:
        """Length of the direction over that of the summed loss' gradient, shape ``[s]``."""
        return (self.squares / self._sum_squares).sqrt()

    @property
    def _products_with_sum(self) -> Tensor:
        return self.grams.nansum(dim=2).where(self.norms.isfinite(), nan)

    @property
    def _sum_squares(self) -> Tensor:
        return self._products_with_sum.nansum(dim=1).clamp(min=0)


def cosines(grams: Tensor) -> Tensor:
    """Return the cosines that belong to Gram matrices; NaN where a gradient is zero.

    Args:
        grams: Shape ``[..., m, m]``.
    """
    norms = grams.diagonal(dim1=-2, dim2=-1).sqrt()
    return grams / (norms[..., :, None] * norms[..., None, :])


def read(steps: Sequence[Step]) -> Course:
    """Bring what was kept of some steps to the host."""
    tasks = tuple(dict.fromkeys(task for step in steps for task in step.record.tasks))
    number = {task: i for i, task in enumerate(tasks)}
    s, m = len(steps), len(tasks)
    losses, weights, slopes = torch.full((3, s, m), nan, dtype=torch.float64)
    grams = torch.full((s, m, m), nan, dtype=torch.float64)
    squares, residuals = torch.full((2, s), nan, dtype=torch.float64)
    for row, step in enumerate(steps):
        record = step.record
        here = torch.tensor([number[task] for task in record.tasks])
        losses[row, here] = _host(record.losses)
        weights[row, here] = _weights(record)
        if record.grams:
            gram, pulled, squares[row] = products(record)
            grams[row, here[:, None], here], slopes[row, here] = gram, pulled
        found = [float(s["residual"]) for s in record.stats.values() if "residual" in s]
        residuals[row] = max(found, default=nan)
    numbers = torch.tensor([step.number for step in steps], dtype=torch.int64)
    seconds = torch.tensor([step.seconds for step in steps], dtype=torch.float64)
    return Course(tasks, numbers, seconds, losses, weights, grams, slopes, squares, residuals)


def products(record: StepRecord) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return what a step tells about inner products, summed over its groups.

    With :math:`G_g` the Gram matrix and :math:`w_g` the weights of a group, the direction
    :math:`d = \bigoplus_g J_g^\top w_g` has :math:`\langle g_i, d \rangle = \sum_g (G_g w_g)_i`
    and :math:`\|d\|^2 = \sum_g w_g^\top G_g w_g`: no gradient is needed.

    Returns:
        The Gram matrix, shape ``[m, m]``; products with the direction, shape ``[m]``; the squared
        length of the direction, 0-dim. NaN for tasks that share nothing, and the last two for
        rules without weights.
    """
    m = len(record.tasks)
    gram = torch.zeros(m, m, dtype=torch.float64)
    pulled, square = torch.zeros_like(gram[0]), torch.zeros_like(gram[0, 0])
    for i, (group, own) in enumerate(record.grams.items()):
        here = torch.tensor(record.members[group])
        own, weights = _host(own), _weights_of(record, i)[here]
        gram[here[:, None], here] += own
        product = own @ weights
        pulled[here] += product
        square += weights @ product
    alone = sorted(set(range(m)).difference(*record.members.values()))
    gram[alone], gram[:, alone], pulled[alone] = nan, nan, nan
    return gram, pulled, square.clamp(min=0)


def _weights_of(record: StepRecord, group: int) -> Tensor:
    """Return the weights on a group, shape ``[m]``, by its place; NaN if there are none."""
    if record.weights is None:
        return torch.full((len(record.tasks),), nan, dtype=torch.float64)
    weights = _host(record.weights)
    return weights[group] if weights.ndim > 1 else weights


def _weights(record: StepRecord) -> Tensor:
    """Return one weight per task, shape ``[m]``: the mean over the groups that it reaches."""
    m, n_groups = len(record.tasks), max(len(record.members), 1)
    found = torch.full((n_groups, m), nan, dtype=torch.float64)
    for i, here in enumerate(record.members.values()):
        found[i, here] = _weights_of(record, i)[here]
    return found.nanmean(dim=0) if record.members else _weights_of(record, 0)


def _host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)
