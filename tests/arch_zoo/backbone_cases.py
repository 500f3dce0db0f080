"""Every architecture on stand-ins of the networks people have, and on their batches.

The stand-ins have the names and the structure by which `arch_zoo.stages` knows the real ones, which
`tests/integrations/test_backbones.py` takes. Each has three stages.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from more_cases import Embed, normal, perceptron, table
from torch import Tensor, nn

from arch_zoo import (
    CGC,
    HPS,
    MTAN,
    PLE,
    Adapted,
    AutoMTL,
    CrossStitch,
    DSelectK,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
    film,
    stages,
)
from arch_zoo.tensors import pooled

TASKS = {"a": 1, "b": 2}


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class ResNet(nn.Module):
    """As torchvision's: a stem, four layers, pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(2)
        self.layer1, self.layer2 = conv(4, 4), conv(4, 6, 2)
        self.layer3, self.layer4 = conv(6, 8, 2), conv(8, 8)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))  # type: ignore[no-any-return]


class Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class Merge(nn.Module):
    """Halve a map whose channels come last, and widen it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.reduction(torch.cat(parts, -1))  # type: ignore[no-any-return]


class LastBlock(nn.Module):
    """A residual block over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x)).tanh()


class SwinTransformer(nn.Module):
    """As torchvision's: maps whose channels come last, until the very end."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 4, 2, 2), ToLast(), nn.LayerNorm(4))
        self.features = nn.Sequential(
            stem,
            nn.Sequential(LastBlock(4)),
            Merge(4, 6),
            nn.Sequential(LastBlock(6)),
            Merge(6, 8),
            nn.Sequential(LastBlock(8)),
        )
        self.norm, self.permute = nn.LayerNorm(8), Permute()
        self.avgpool, self.flatten, self.head = (
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.permute(self.norm(self.features(x)))
        return self.head(self.flatten(self.avgpool(x)))  # type: ignore[no-any-return]


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, 8, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """As timm's: patches, a class token, blocks, a norm."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.norm_pre = Patches(), nn.Identity()
        self.cls_token = nn.Parameter(normal(1, 1, 8))
        self.pos_embed = nn.Parameter(normal(1, 17, 8, seed=1))
        self.pos_drop, self.patch_drop = nn.Dropout(0.0), nn.Identity()
        self.blocks = nn.ModuleList(LastBlock(8) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def _pos_embed(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self.pos_drop(tokens + self.pos_embed)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            x = block(x)
        return self.forward_head(self.norm(x))


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)

    def forward(
        self, input_ids: Tensor, token_type_ids: None = None, position_ids: None = None
    ) -> Tensor:
        return self.words(input_ids)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention with an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        scores = q @ k.mT / 8**0.5
        scores = scores if attention_mask is None else scores + attention_mask
        attended = (scores.softmax(-1) @ v).squeeze(1)
        return x + self.out(attended)  # type: ignore[no-any-return]


class BertModel(nn.Module):
    """As that of transformers: embeddings and layers with an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(), nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embeddings(input_ids)
        seen = (attention_mask != 0)[:, None, None, :]
        added = torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, torch.finfo(x.dtype).min)
        for layer in self.encoder.layer:
            x = layer(x, added)
        return x  # type: ignore[no-any-return]


class Graph:
    """As PyG's batch: node features, edges, and the graph of each node; no tensor, no mapping."""

    def __init__(self, x: Tensor, edges: Tensor, batch: Tensor, n: int) -> None:
        self.x, self.edges, self.batch, self.n = x, edges, batch, n


class GraphNet(nn.Module):
    """One round of messages, and the sum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 8)

    def forward(self, graph: Graph) -> Tensor:
        h = self.linear(graph.x)
        h = h.index_add(0, graph.edges[1], h[graph.edges[0]]).tanh()
        return h.new_zeros(graph.n, 8).index_add(0, graph.batch, h)


class Head(nn.Module):
    """The mean over positions that the mask keeps, and a linear layer."""

    def __init__(self, outputs: int, layout: str | None) -> None:
        super().__init__()
        self.layout = layout
        self.linear = nn.Linear(8, outputs)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(pooled(x, attention_mask, self.layout))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Backbone:
    """How to build the stages of a network, what it reads, and how its features lie."""

    stages: Callable[[], Sequence[nn.Module]]
    x: Callable[[int, int], Any]  # from the number of examples and a seed
    named: Callable[[int, int], dict[str, Any]] = field(default=lambda n, seed: {})
    layout: str | None = None


def sentences(n: int, seed: int) -> Tensor:
    return torch.randint(0, 20, (n, 6), generator=torch.Generator().manual_seed(seed))


def masks(n: int, seed: int) -> dict[str, Tensor]:
    return {"attention_mask": (torch.arange(6) < 3 + torch.arange(n)[:, None] % 4).long()}


def graphs(n: int, seed: int) -> Graph:
    edges = torch.stack([torch.arange(2 * n), (torch.arange(2 * n) + 1) % (2 * n)])
    return Graph(normal(2 * n, 3, seed=seed), edges, torch.arange(2 * n) // 2, n)


def pictures(n: int, seed: int) -> Tensor:
    return normal(n, 3, 16, 16, seed=seed)


def conv1d() -> list[nn.Module]:
    sizes = [(2, 4), (4, 8), (8, 8)]
    return [nn.Sequential(nn.Conv1d(a, b, 3, padding=1), nn.Tanh()) for a, b in sizes]


BACKBONES: dict[str, Backbone] = {
    "ResNet": Backbone(lambda: stages(ResNet(), 3).parts, pictures, layout="NCHW"),
    "Swin": Backbone(lambda: stages(SwinTransformer()).parts, pictures, layout="NHWC"),
    "ViT": Backbone(lambda: stages(VisionTransformer()).parts, pictures, layout="NLC"),
    "BERT": Backbone(lambda: stages(BertModel()).parts, sentences, masks, layout="NLC"),
    "Conv1d": Backbone(
        conv1d,
        lambda n, seed: normal(n, 2, 20, seed=seed),
        layout="NCL",
    ),
    "table": Backbone(
        lambda: [Embed(), perceptron(8, 8), perceptron(8, 8)],
        table,
    ),
    "graphs": Backbone(lambda: [GraphNet(), perceptron(8, 8), perceptron(8, 8)], graphs),
}

Build = Callable[[Backbone, dict[str, nn.Module]], MultiTaskModel]


def above(backbone: Backbone) -> Callable[[], Sequence[nn.Module]]:
    return lambda: list(backbone.stages())[1:]


ARCHITECTURES: dict[str, Build] = {
    "HPS": lambda b, heads: HPS(b.stages, heads),
    "CrossStitch": lambda b, heads: CrossStitch(b.stages, heads),
    "NDDR": lambda b, heads: CrossStitch(b.stages, heads, mix="nddr"),
    "MTAN": lambda b, heads: MTAN(b.stages, heads),
    "LearningToBranch": lambda b, heads: LearningToBranch(b.stages, heads),
    "MMoE": lambda b, heads: MMoE(above(b), heads, num_experts=2, stem=b.stages()[0]),
    "DSelectK": lambda b, heads: DSelectK(above(b), heads, num_experts=3, k=2, stem=b.stages()[0]),
    "CGC": lambda b, heads: CGC(above(b), heads, num_shared=1, num_specific=1, stem=b.stages()[0]),
    "PLE": lambda b, heads: PLE(
        [lambda: b.stages()[1], lambda: b.stages()[2]],
        heads,
        num_shared=1,
        num_specific=1,
        stem=b.stages()[0],
    ),
    "Adapted": lambda b, heads: Adapted(list(b.stages()), heads, [film("2")]),
    "AutoMTL": lambda b, heads: AutoMTL(list(b.stages()), heads, b.x(2, 0)),
}
GAPS = {("AutoMTL", "graphs")}  # it takes tensors and dicts of them


def build(architecture: str, name: str, seed: int = 0) -> MultiTaskModel:
    model = copy.deepcopy(_built(architecture, name, seed))
    torch.manual_seed(seed)
    return model


@cache
def _built(architecture: str, name: str, seed: int) -> MultiTaskModel:
    backbone = BACKBONES[name]
    torch.manual_seed(seed)
    heads = {task: Head(n, backbone.layout) for task, n in TASKS.items()}
    model = ARCHITECTURES[architecture](backbone, dict(heads))
    return model.initialize(backbone.x(2, 0), **backbone.named(2, 0))
