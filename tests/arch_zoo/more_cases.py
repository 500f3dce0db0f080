"""Architectures with inputs of their own: a new one is one entry of `MORE`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo import (
    AITM,
    DBMTL,
    ESCM2,
    ESMM,
    PLE,
    STEM,
    Adapted,
    AdaShare,
    AITMDecoder,
    CrossStitch,
    ESMMDecoder,
    InvPT,
    MMoE,
    MTINet,
    MultiTaskModel,
    PADNet,
    PEPNet,
    SparseMoE,
    TaskRouted,
    bottleneck,
    film,
    grouped,
    lora,
    norm_per_task,
    squeeze_excite,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Embed(nn.Module):
    """Features of a dict batch: numbers and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.dense = nn.Embedding(10, 8), nn.Linear(3, 8)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.users(batch["user"]) + self.dense(batch["dense"])  # type: ignore[no-any-return]


def table(n: int = 4, seed: int = 0) -> dict[str, Tensor]:
    users = torch.randint(0, 10, (n,), generator=torch.Generator().manual_seed(seed))
    return {"user": users, "dense": normal(n, 3, seed=seed)}


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(a, b, 3, s, 1) for a, b, s in [(3, 4, 1), (4, 6, 2), (6, 8, 2)]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x).tanh()
            maps.append(x)
        return maps


class Block(nn.Module):
    """A residual block over tokens with a sparse mixture of experts."""

    def __init__(self, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.moe = SparseMoE(expert, 8, n=4, k=2, tasks=tasks, z_weight=0.1)

    def forward(
        self, x: Tensor, task: str, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        y, aux = self.moe(self.norm(x), attention_mask, task)
        return x + y, aux


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def perceptron(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def towers(*names: str, sizes: tuple[int, ...] = (8, 6)) -> dict[str, nn.Module]:
    return {name: perceptron(*sizes) for name in names}


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, groups=2),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.Flatten(2),
    )


class MeanHead(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(2))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """An architecture, what it reads, and whether a task alone runs modules of others."""

    build: Callable[[], MultiTaskModel]
    x: Callable[..., Any] = table  # from the number of examples and a seed
    named: Callable[..., dict[str, Any]] = field(default=lambda n, seed: {})
    reads_others: bool = False


def picture(n: int = 4, seed: int = 0) -> Tensor:
    return normal(n, 3, 8, 8, seed=seed)


def prior(n: int, seed: int) -> dict[str, Any]:
    domain = torch.arange(n) % 3
    return {"domain": domain, "prior": normal(n, 5, seed=seed)}


def pepnet(**options: Any) -> PEPNet:
    known = {"domain": nn.Embedding(3, 2), "prior": nn.Linear(5, 2), "even": False, **options}
    return PEPNet(Embed, towers("a", "b", sizes=(4, 1)), 8, [6, 4], **known)


def chain(names: str = "abc", **options: Any) -> AITMDecoder:
    return AITMDecoder(towers(*names), towers(*names, sizes=(6, 1)), 6, **options)


def dbmtl() -> DBMTL:
    relations = {"b": perceptron(12, 6), "c": perceptron(18, 6)}
    parents = {"c": ["b", "a"], "b": ["d"]}
    return DBMTL(Embed, towers(*"cbad"), towers(*"abcd", sizes=(6, 1)), parents, relations)


def adapted(*rules: Any, **options: Any) -> Adapted:
    return Adapted(convolutional(), {"a": MeanHead(1), "b": MeanHead(2)}, rules, **options)


MORE: dict[str, Case] = {
    "ESMM": Case(lambda: ESMM(Embed, perceptron(8, 1), perceptron(8, 4, 1))),
    "ESMM detached on MMoE": Case(
        lambda: MMoE(
            lambda: perceptron(8, 8),
            ESMMDecoder(perceptron(8, 1), perceptron(8, 1), detach_click=True),
            num_experts=2,
            stem=Embed,
        ),
        reads_others=True,
    ),
    "ESCM2": Case(
        lambda: ESCM2(Embed, perceptron(8, 1), perceptron(8, 1), imputation=perceptron(8, 1))
    ),
    "AITM": Case(lambda: AITM(Embed, towers(*"abc"), towers(*"abc", sizes=(6, 1)), 6)),
    "AITM on PLE": Case(
        lambda: PLE(
            [lambda: perceptron(8, 8)] * 2, chain(), num_shared=1, num_specific=1, stem=Embed
        )
    ),
    "DBMTL": Case(dbmtl),
    "PEPNet": Case(pepnet, named=prior),
    "STEM": Case(
        lambda: STEM(Embed, lambda: perceptron(8, 8), towers("a", "b", "c", sizes=(8, 1))),
        reads_others=True,
    ),
    "NDDR": Case(
        lambda: CrossStitch(
            [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(2)],
            {"a": MeanHead(1), "b": MeanHead(2)},
            mix="nddr",
            stitch_after=[0, 1],
        ),
        picture,
    ),
    "sluice": Case(
        lambda: CrossStitch(
            [Embed(), perceptron(8, 8), perceptron(8, 8)],
            towers("a", "b", "c", sizes=(8, 1)),
            granularity="layer",
            subspaces=2,
            skips=True,
            stitch_last=True,
            orthogonality_weight=0.1,
        )
    ),
    "LoRA": Case(lambda: adapted(lora(rank=2, shared_rank=2)), picture),
    "adapters": Case(
        lambda: adapted(norm_per_task(), bottleneck("0", 2), film("3"), squeeze_excite("4", 2)),
        picture,
    ),
    "adapted whole": Case(lambda: adapted(film("4"), freeze=False), picture),
    "PADNet": Case(
        lambda: PADNet(
            nn.Conv2d(3, 8, 3, padding=1), {"a": 1, "b": 2}, auxiliary={"edge": 1}, channels=4
        ),
        picture,
        reads_others=True,
    ),
    "MTINet": Case(
        lambda: MTINet(Pyramid(), {"a": 1, "b": 2}, [4, 6, 8], hidden=6),
        picture,
        reads_others=True,
    ),
    "InvPT": Case(
        lambda: InvPT(nn.Conv2d(3, 8, 3, padding=1), {"a": 1, "b": 2}, channels=8, stages=2),
        picture,
        reads_others=True,
    ),
    "TaskRouted": Case(
        lambda: TaskRouted(
            [nn.Linear(3, 8), Block(("a", "b")), Block(())],
            {"a": nn.Linear(8, 1), "b": nn.Linear(8, 2)},
        ),
        lambda n=4, seed=0: normal(n, 5, 3, seed=seed),
    ),
    "AdaShare": Case(
        lambda: AdaShare(
            [nn.Linear(3, 8), Residual(8), Residual(8)],
            towers("a", "b", sizes=(8, 1)),
            normal(4, 3),
        ),
        lambda n=4, seed=0: normal(n, 3, seed=seed),
    ),
    "grouped": Case(
        lambda: grouped(
            [Embed(), perceptron(8, 8)],
            towers("a", "b", "c", sizes=(8, 1)),
            [("a", "c"), ("b",)],
            split_at=1,
        )
    ),
}


def make(name: str, seed: int = 0) -> tuple[MultiTaskModel, Any, dict[str, Any]]:
    """Return a model with seeded weights, sized by its input, a batch, and its named inputs."""
    case = MORE[name]
    torch.manual_seed(seed)
    model, x, named = case.build(), case.x(4, 0), case.named(4, 0)
    return model.initialize(x, **named), x, named
