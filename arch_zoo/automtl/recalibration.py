"""Statistics of norm layers, measured anew."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from arch_zoo.inputs import Inputs


def recalibrate(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Replace the running statistics of norm layers by their means over some batches.

    A supermodel's norms see all that its tasks compute, mixed; a network lowered from it needs
    statistics of its own. All else runs as in evaluation, and nothing is trained.

    Args:
        model: Any model; the modes of its modules are kept.
        batches: Inputs of the usual kind, each counted alike.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> recalibrate(norm, [torch.zeros(4, 2), torch.ones(4, 2)])
        >>> norm.running_mean
        tensor([0.5000, 0.5000])
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    before = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in before:
            module.training = mode
