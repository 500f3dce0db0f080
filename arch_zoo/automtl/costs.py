"""What models cost: parameters, multiply-adds, time."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from arch_zoo.inputs import Inputs


class Cost(NamedTuple):
    """What a module costs.

    Args:
        parameters: Their number, in entries; one that is used twice counts once.
        operations: Multiply-adds of one example, in matrix products and convolutions.
    """

    parameters: int
    operations: int


def model_cost(model: nn.Module, example: Inputs) -> Cost:
    """Return what a model costs, or any other module.

    Args:
        model: A module of one input.
        example: A batch for it, or one batch per task, of which the first examples are used.
    """
    with _evaluating(model), _counter() as counter:
        model(_first(example))
    return Cost(_entries(model), counter.get_total_flops() // 2)


def latencies(
    models: Mapping[str, nn.Module], example: Inputs, rounds: int = 20
) -> dict[str, float]:
    """Return how long forward passes in evaluation mode take; only the ratios travel.

    Args:
        models: They take turns, so that a busy machine slows all of them alike.
        example: A batch, or one batch per task, on the device of the models.
        rounds: Passes of each model that count; at least 1. Two more come before.

    Returns:
        Medians by name, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    with _evaluating(*models.values()), torch.no_grad():
        for _ in range(rounds + 2):
            for name, model in models.items():
                start = _now()
                model(example)
                times[name].append(_now() - start)
    return {name: median(found[2:]) for name, found in times.items()}


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Count operations, with attention written out, for fused kernels go uncounted."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        kernel, counting = sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False)
        with torch.no_grad(), kernel, counting as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and afterwards the mode that each submodule had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _first(example: Inputs) -> Inputs:
    if isinstance(example, Tensor):
        return example[:1]
    # tasks that were given one and the same batch are to share a pass still
    parts: dict[int, Tensor] = {}
    return pytree.tree_map(lambda batch: parts.setdefault(id(batch), batch[:1]), example)


def _entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
