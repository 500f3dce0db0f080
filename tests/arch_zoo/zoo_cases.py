"""Every architecture on every kind of input: a new architecture is one entry of `CASES`."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from arch_zoo import (
    CGC,
    HPS,
    MTAN,
    PLE,
    AutoMTL,
    CrossStitch,
    DSelectK,
    ExpertBank,
    Gate,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
)
from arch_zoo.tensors import pooled

SIZES = {"vector": [()], "image": [(9, 7), (6, 8)], "tokens": [(5,), (3,)]}
WIDTH = 8


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return pooled(x)


@dataclass(frozen=True)
class Kit:
    """Parts of models for one kind of input: vectors, images, token sequences."""

    kind: str

    def x(self, batch: int = 4, size: int = 0, seed: int = 0) -> Tensor:
        positions = SIZES[self.kind][size % len(SIZES[self.kind])]
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, *positions, 3) if self.kind == "tokens" else (batch, 3, *positions)
        return torch.randn(shape, generator=generator)

    def stage(self, depth: int = 0) -> nn.Module:
        width = WIDTH if depth else 3
        if self.kind == "image":
            layer: nn.Module = nn.Conv2d(width, WIDTH, 3, stride=1 + (depth == 0), padding=1)
        else:
            layer = nn.Linear(width, WIDTH)
        return nn.Sequential(layer, nn.Tanh())

    def factories(self, n: int) -> list[Callable[[], nn.Module]]:
        return [lambda depth=depth: self.stage(depth) for depth in range(n)]  # type: ignore[misc]

    def heads(self, **outputs: int) -> dict[str, nn.Module]:
        outputs = outputs or {"a": 1, "b": 2, "c": 3}
        return {name: nn.Sequential(Pool(), nn.Linear(WIDTH, n)) for name, n in outputs.items()}


def spatial(x: Tensor) -> Tensor:
    return pooled(x).square()


CASES: dict[str, Callable[[Kit], MultiTaskModel]] = {
    "HPS": lambda kit: HPS(kit.factories(2), kit.heads()),
    "HPS one task": lambda kit: HPS(kit.stage, kit.heads(a=2)),
    "CrossStitch": lambda kit: CrossStitch(kit.factories(3), kit.heads()),
    "CrossStitch layer last": lambda kit: CrossStitch(
        {name: kit.factories(2) for name in "abc"},
        kit.heads(),
        granularity="layer",
        stitch_last=True,
    ),
    "CrossStitch none": lambda kit: CrossStitch(kit.factories(2), kit.heads(), stitch_after=()),
    "MMoE": lambda kit: MMoE(kit.stage, kit.heads(), num_experts=3),
    "MMoE stem": lambda kit: MMoE(
        lambda: kit.stage(1), kit.heads(), num_experts=2, gate=Gate(hidden=(5,)), stem=kit.stage()
    ),
    "MMoE detached vmap": lambda kit: MMoE(
        ExpertBank(lambda: kit.stage(1), 2, backend="vmap"),
        kit.heads(),
        gate=Gate(spatial, detach_input=True),
        stem=kit.stage,
    ),
    "CGC": lambda kit: CGC(kit.stage, kit.heads(), num_shared=2, num_specific=1),
    "CGC uneven stem": lambda kit: CGC(
        lambda: kit.stage(1),
        kit.heads(),
        num_shared=2,
        num_specific={"a": 2, "b": 0, "c": 1},
        stem=kit.stage,
    ),
    "CGC private": lambda kit: CGC(kit.stage, kit.heads(), num_shared=0, num_specific=2),
    "PLE": lambda kit: PLE(kit.factories(2), kit.heads(), num_shared=1, num_specific=1),
    "PLE uneven": lambda kit: PLE(
        kit.factories(3), kit.heads(), num_shared=2, num_specific={"a": 0, "b": 1, "c": 2}
    ),
    "PLE without stream": lambda kit: PLE(
        kit.factories(2), kit.heads(), num_shared=1, num_specific=1, shared_stream=False
    ),
    "DSelectK": lambda kit: DSelectK(
        kit.stage, kit.heads(), num_experts=3, k=2, entropy_weight=0.1
    ),
    "DSelectK task stem": lambda kit: DSelectK(
        lambda: kit.stage(1), kit.heads(), num_experts=4, k=2, condition="task", stem=kit.stage
    ),
    "MTAN": lambda kit: MTAN(kit.factories(2), kit.heads()),
    "MTAN conv": lambda kit: MTAN(kit.factories(3), kit.heads(), refine="conv", resize="avg"),
    "MTAN none": lambda kit: MTAN(
        [(kit.stage(0), kit.stage(1)), kit.stage(1)], kit.heads(), refine=None, resize="interp"
    ),
    "LearningToBranch": lambda kit: LearningToBranch(kit.factories(3), kit.heads()),
    "LearningToBranch soft": lambda kit: LearningToBranch(
        kit.factories(2), kit.heads(), nodes_per_stage=[2, 3], hard=False
    ),
    "LearningToBranch lowered": lambda kit: lowered(kit),
    "AutoMTL": lambda kit: automtl(kit),
    "AutoMTL lowered": lambda kit: automtl(kit).lower(
        {
            "a": torch.eye(3)[[0, 0, 2]],
            "b": torch.eye(3)[[0, 0, 1]],
            "c": torch.eye(3)[[0, 1, 0]],
        }
    ),
}


def assert_sets(model: MultiTaskModel, outputs: Mapping[str, Tensor]) -> None:
    """Compare the task sets with what autograd finds."""
    found: dict[str, set[str]] = {name: set() for name, _ in model.named_parameters()}
    for task, output in outputs.items():
        gradients = torch.autograd.grad(
            output.sum(), list(model.parameters()), allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                found[name].add(task)
    assert model.parameter_task_sets() == {name: frozenset(tasks) for name, tasks in found.items()}


def automtl(kit: Kit) -> AutoMTL:
    stages = [stage() for stage in kit.factories(3)]
    return AutoMTL(stages, kit.heads(), kit.x())


def lowered(kit: Kit) -> MultiTaskModel:
    model = LearningToBranch(kit.factories(2), kit.heads())
    choose(model, {"a": (0, 0), "b": (0, 0), "c": (0, 2)})
    return model.lower()


def choose(model: LearningToBranch, paths: dict[str, tuple[int, ...]]) -> None:
    """Make the paths the likeliest ones, beyond doubt."""
    with torch.no_grad():
        for name, path in paths.items():
            model.head_choices[name].logits[0, path[-1]] = 1e4
            for choice, parent, child in zip(model.choices, path, path[1:], strict=False):
                choice.logits[child, parent] = 1e4


def build(case: str, kind: str, seed: int = 0) -> MultiTaskModel:
    """Return a model of the table with seeded weights, sized by its first input."""
    model = copy.deepcopy(_built(case, kind, seed))
    torch.manual_seed(seed)
    return model


@cache
def _built(case: str, kind: str, seed: int) -> MultiTaskModel:
    torch.manual_seed(seed)
    kit = Kit(kind)
    return CASES[case](kit).initialize(kit.x())
