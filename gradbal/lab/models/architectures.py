"""Which architecture the demo's network has: hard sharing, or one of arch_zoo's.

An application may join the two packages. The library does not, so arch_zoo is imported by name, and
only when one of its architectures is asked for.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from torch import nn

PLAIN = "HPS"
Stages = tuple[Callable[[], nn.Module], ...]
Build = Callable[[Any, Stages, Mapping[str, nn.Module]], nn.Module]  # from the package arch_zoo


def upper(stages: Stages) -> Callable[[], nn.Module]:
    """Return what makes all stages but the first, as one module."""
    return lambda: nn.Sequential(*(stage() for stage in stages[1:]))


ARCHITECTURES: dict[str, Build] = {
    PLAIN: lambda zoo, stages, heads: zoo.HPS(stages, heads),
    "CrossStitch": lambda zoo, stages, heads: zoo.CrossStitch(stages, heads),
    "MMoE": lambda zoo, stages, heads: zoo.MMoE(
        upper(stages), heads, num_experts=3, stem=stages[0]
    ),
    "MTAN": lambda zoo, stages, heads: zoo.MTAN(stages, heads),
    "CGC": lambda zoo, stages, heads: zoo.CGC(
        upper(stages), heads, num_shared=2, num_specific=1, stem=stages[0]
    ),
    "PLE": lambda zoo, stages, heads: zoo.PLE(
        stages[1:], heads, num_shared=2, num_specific=1, stem=stages[0]
    ),
    "DSelectK": lambda zoo, stages, heads: zoo.DSelectK(
        upper(stages), heads, num_experts=3, k=2, entropy_weight=1e-2, stem=stages[0]
    ),
    "LearningToBranch": lambda zoo, stages, heads: zoo.LearningToBranch(stages, heads),
}


def build(arch: str, stages: Stages, heads: Mapping[str, nn.Module]) -> nn.Module:
    """Return a model ``images -> (outputs by task, auxiliary losses)``.

    Args:
        arch: One of ``ARCHITECTURES``.
        stages: Makers of the parts of an encoder, the first one first.
        heads: The heads, by task.
    """
    return ARCHITECTURES[arch](import_module("arch_zoo"), stages, heads)
