"""The arguments of one call of ``backward`` or ``step``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gradbal.distributed.counts import Counts
from gradbal.graph.losses import Batch, named_losses, read_batch

AuxLosses = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """The arguments of one call.

    Attributes:
        aux: A loss that is no task, or a mapping of such losses.
        accumulate: Only put the task gradients aside.
        scaler: A ``GradScaler``.
        retain_graph: Keep the graph.
        fresh: Replace ``.grad`` instead of adding to it.
        hold: Remember the weights, because the losses will be evaluated again in this step.
        replay: Use the weights that were held.
        more: Losses of further batches, or closures that return them.
        counts: Samples behind each loss in this process; None for equally many.
    """

    aux: AuxLosses | None = None
    accumulate: bool = False
    scaler: Any = None
    retain_graph: bool = False
    fresh: bool = False
    hold: bool = False
    replay: bool = False
    more: Sequence[Any] = ()
    counts: Counts | None = None

    @cached_property
    def aux_batch(self) -> Batch | None:
        """The auxiliary losses that have a graph, or None if there is none."""
        if self.aux is None or (not isinstance(self.aux, Tensor) and not self.aux):
            return None
        losses = [self.aux] if isinstance(self.aux, Tensor) and self.aux.ndim == 0 else self.aux
        _, found = named_losses(losses)
        batch = read_batch(found, range(len(found)))
        return batch if batch.tasks else None

    def initial_gradient(self, device: torch.device) -> Tensor | None:
        """Return the factor on all gradients, 0-dim, or None for one."""
        if self.scaler is None:
            return None
        scale: Tensor = self.scaler.scale(torch.ones((), device=device))
        return scale
