"""What a step leaves behind for those who want to look; nothing is read back until they do."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PAIRS_UP_TO = 8  # tasks for which every single cosine is a metric


@dataclass
class StepRecord:
    """The newest step.

    Attributes:
        tasks: Names of the present tasks.
        losses: Their losses, shape ``[m]``.
        weights: Their weights on the shared parameters, shape ``[m]``, as they were applied;
            with several groups ``[g, m]``; None for elementwise rules and skipped steps.
        heads: Their weights on task-specific parameters, shape ``[m]``.
        grams: The Gram matrix of each group, over the tasks that reach it; empty if nothing
            looked at gradients.
        members: For each group, the positions of these tasks.
        stats: What the rule reports, such as a solver's residual, by group.
        skipped: Whether the step was left out because of a non-finite gradient.
    """

    tasks: tuple[str, ...]
    losses: Tensor
    weights: Tensor | None = None
    heads: Tensor | None = None
    grams: dict[str, Tensor] = field(default_factory=dict)
    members: dict[str, list[int]] = field(default_factory=dict)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped: bool = False

    def objective(self) -> Tensor:
        """Return the weighted sum of the losses, 0-dim."""
        weights = self.weights if self.weights is not None and self.weights.ndim == 1 else None
        losses = self.losses
        return losses.sum() if weights is None else losses @ weights.to(losses.device)

    def metrics(self) -> dict[str, Tensor]:
        """Return a flat dict of 0-dim tensors, ready for any logger."""
        out: dict[str, Tensor] = {}
        for i, task in enumerate(self.tasks):
            out[f"gradbal/loss/{task}"] = self.losses[i]
            if self.weights is not None and self.weights.ndim == 1:
                out[f"gradbal/weight/{task}"] = self.weights[i]
        if len(self.grams) == 1:
            ((group, gram),) = self.grams.items()
            out |= _gram_metrics([self.tasks[i] for i in self.members[group]], gram)
        if len(self.stats) == 1:
            ((group, stats),) = self.stats.items()
            out |= _flat_stats([self.tasks[i] for i in self.members[group]], stats)
        return out


def _flat_stats(tasks: list[str], stats: dict[str, Any]) -> dict[str, Tensor]:
    """Return what a rule reports, one entry per task where it reports one number for each."""
    out: dict[str, Tensor] = {}
    for name, value in stats.items():
        numbers = torch.as_tensor(value)
        if numbers.ndim:
            pairs = zip(tasks, numbers, strict=True)
            out |= {f"gradbal/{name}/{task}": number for task, number in pairs}
        else:
            out[f"gradbal/{name}"] = numbers
    return out


def _gram_metrics(tasks: list[str], gram: Tensor) -> dict[str, Tensor]:
    norms = gram.diagonal().sqrt()
    out = {f"gradbal/norm/{task}": norm for task, norm in zip(tasks, norms, strict=True)}
    if len(tasks) < 2:
        return out
    units = norms.where(norms > 0, 1)
    cosines = gram / torch.outer(units, units)
    rows, columns = torch.triu_indices(len(tasks), len(tasks), offset=1, device=gram.device)
    pairs = cosines[rows, columns]
    out["gradbal/min_cos"] = pairs.amin()
    out["gradbal/conflict_share"] = (pairs < 0).to(gram.dtype).mean()
    if len(tasks) <= PAIRS_UP_TO:
        for i, a in enumerate(tasks):
            for j in range(i + 1, len(tasks)):
                out[f"gradbal/cos/{a}/{tasks[j]}"] = cosines[i, j]
    return out
