"""Supermodels of small backbones, and choices for them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache

import pytest
import torch
from backbones import WIDTH, StochasticDepth, backbone, pictures
from torch import Tensor, nn

from arch_zoo import AutoMTL
from arch_zoo.automtl.policy import BRANCHES

NAMES = ("ResNet", "MobileNetV2", "EfficientNet")
SOME = [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
Choices = dict[str, Tensor]


def heads(tasks: Sequence[str] = "abc") -> dict[str, nn.Module]:
    return {
        task: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 1 + n))
        for n, task in enumerate(tasks)
    }


def build(name: str = "ResNet", tasks: Sequence[str] = "abc", **options: object) -> AutoMTL:
    """Return a seeded supermodel without stochastic depth, in float64.

    Tracing takes most of the time, so those without options of their own are copies.
    """
    if options.keys() <= {"norm"}:
        model = deepcopy(_kept(name, tuple(tasks), str(options.get("norm", "shared"))))
        torch.manual_seed(0)
        return model
    return _built(name, tasks, options)


@cache
def _kept(name: str, tasks: tuple[str, ...], norm: str) -> AutoMTL:
    return _built(name, tasks, {"norm": norm})


def _built(name: str, tasks: Sequence[str], options: Mapping[str, object]) -> AutoMTL:
    network = backbone(name).double()
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    made = {task: head.double() for task, head in heads(tasks).items()}
    options = {"leaves": [StochasticDepth], **options}
    return AutoMTL(network, made, images(), **options).double()  # type: ignore[arg-type]


def images(batch: int = 3, size: tuple[int, int] = (20, 17), seed: int = 0) -> Tensor:
    return pictures(batch, size, seed).double()


def all_take(model: AutoMTL, branch: str) -> Choices:
    """Return choices of one branch everywhere."""
    row = torch.tensor([name == branch for name in BRANCHES]).double()
    return {task: row.repeat(len(model.operators), 1) for task in model.tasks}


def drawn(model: AutoMTL, seed: int) -> Choices:
    """Return legal choices in which tasks agree on the first operators more often than not."""
    generator, legal = torch.Generator().manual_seed(seed), model.policy.legal
    choices = {}
    for task in model.tasks:
        scores = torch.rand(legal.shape, generator=generator).masked_fill(~legal, -1)
        choices[task] = nn.functional.one_hot(scores.argmax(dim=-1), 3).double()
    for task in model.tasks[1:]:
        together = seed % (len(model.operators) + 1)
        choices[task][:together] = choices[model.tasks[0]][:together]
    return choices


def perturb(model: nn.Module) -> None:
    """Give every parameter and statistic a value of its own, so that copies differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer += 0.1 * torch.rand_like(buffer)


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for task in left:
        torch.testing.assert_close(left[task], right[task], rtol=1e-10, atol=1e-10)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    assert all(torch.equal(left[task], right[task]) for task in left)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def calls(model: nn.Module, *args: object) -> Counter[str]:
    """Count the calls of all modules that have no submodules."""
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    return counts
