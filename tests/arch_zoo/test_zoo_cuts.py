"""Stand-ins of further backbones, with the names by which `arch_zoo.stages` knows them."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backbone_cases import LastBlock, Layer, Merge, ToLast, conv
from more_cases import MeanHead, Pyramid, adapted, normal, perceptron
from torch import Tensor, nn

from arch_zoo import (
    HPS,
    AutoMTL,
    CrossStitch,
    MTINet,
    PerTask,
    SparseMoE,
    TaskRouted,
    lookahead_affinity,
    lora,
    stages,
)
from arch_zoo.encoders import Chain
from arch_zoo.inputs import call


def flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class MobileNetV2(nn.Module):
    """As torchvision's, without a pooling module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = flat(conv(3, 4, 2), conv(4, 4), conv(4, 6, 2), conv(6, 6), conv(6, 8))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class ConvNeXt(nn.Module):
    """As torchvision's, with the norm in the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = flat(conv(3, 4, 4), conv(4, 4), conv(4, 6, 2), conv(6, 6))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = flat(nn.GroupNorm(1, 6), nn.Flatten(), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embedding, self.dropout = nn.Parameter(normal(1, 17, 8)), nn.Dropout(0.1)
        self.layers, self.ln = flat(LastBlock(8), LastBlock(8)), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(x + self.pos_embedding)))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """As torchvision's: a class token, and positions in the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_proj, self.class_token = nn.Conv2d(3, 8, 4, 4), nn.Parameter(normal(1, 1, 8))
        self.encoder, self.heads = Encoder(), nn.Linear(8, 5)

    def _process_input(self, x: Tensor) -> Tensor:
        return self.conv_proj(x).flatten(2).mT  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self._process_input(x)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], 1)
        return self.heads(self.encoder(tokens)[:, 0])  # type: ignore[no-any-return]


class EfficientNet(nn.Module):
    """As timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.blocks = flat(conv(4, 6, 2), conv(6, 6))
        self.conv_head, self.bn2 = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.global_pool = flat(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv_head(self.blocks(self.bn1(self.conv_stem(x)))))
        return self.classifier(self.global_pool(x))  # type: ignore[no-any-return]


class MobileNetV3(nn.Module):
    """As timm's, which pools before its last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.act1, self.blocks = nn.Hardswish(), flat(conv(4, 6, 2), conv(6, 6))
        self.global_pool, self.conv_head = nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 8, 1)
        self.norm_head, self.act2 = nn.Identity(), nn.Hardswish()
        self.flatten, self.classifier = nn.Flatten(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.global_pool(self.blocks(self.act1(self.bn1(self.conv_stem(x)))))
        x = self.flatten(self.act2(self.norm_head(self.conv_head(x))))
        return self.classifier(x)  # type: ignore[no-any-return]


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        axes = (2, 3) if x.shape[1] == self.fc.in_features else (1, 2)
        return x.mean(axes) if pre_logits else self.fc(x.mean(axes))


class HeadedNet(nn.Module):
    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits)  # type: ignore[no-any-return,operator]


def timm_convnext() -> nn.Module:
    class ConvNeXt(HeadedNet):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm_pre = conv(3, 4, 4), nn.Identity()
            self.stages, self.head = flat(conv(4, 4), conv(4, 6, 2)), Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm_pre(self.stages(self.stem(x))))  # type: ignore[no-any-return]

    return ConvNeXt()


def timm_swin() -> nn.Module:
    class SwinTransformer(HeadedNet):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = flat(nn.Conv2d(3, 4, 4, 4), ToLast())
            self.layers = flat(LastBlock(4), flat(Merge(4, 6), LastBlock(6)))
            self.norm, self.head = nn.LayerNorm(6), Head(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.layers(self.patch_embed(x))))  # type: ignore[no-any-return]

    return SwinTransformer()


PICTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module], str]] = {
    "torchvision MobileNetV2": (MobileNetV2, lambda m: m.classifier, "NCHW"),
    "torchvision ConvNeXt": (ConvNeXt, lambda m: m.classifier[2], "NCHW"),
    "torchvision ViT": (VisionTransformer, lambda m: m.heads, "NLC"),
    "timm EfficientNet": (EfficientNet, lambda m: m.classifier, "NCHW"),
    "timm MobileNetV3": (MobileNetV3, lambda m: m.classifier, "NCHW"),
    "timm ConvNeXt": (timm_convnext, lambda m: m.head.fc, "NCHW"),
    "timm Swin": (timm_swin, lambda m: m.head.fc, "NHWC"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pieces_compute_what_the_whole_does(name: str) -> None:
    torch.manual_seed(0)
    make, classifier, layout = PICTURES[name]
    model, x = make().eval(), normal(2, 3, 16, 16)
    cut = stages(model)
    assert len(cut.parts) == 2
    assert cut.layout == layout
    found = classifier(model)(cut.output(cut.neck(Chain(*cut.parts)(x))))
    torch.testing.assert_close(found, model(x))


class Causal(Layer):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is None:
            seen = torch.ones(x.shape[1], x.shape[1]).tril()
            attention_mask = torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf)
        return super().forward(x, attention_mask)


class GPT2Model(nn.Module):
    """As that of transformers: each token sees those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(20, 8), nn.Embedding(9, 8)
        self.drop, self.ln_f = nn.Dropout(0.0), nn.LayerNorm(8)
        self.h = nn.ModuleList(Causal() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))
        for layer in self.h:
            x = layer(x)
        return self.ln_f(x)  # type: ignore[no-any-return]


class Biased(nn.Module):
    """Attention with a bias for each distance, which the first block alone has."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias, self.out = nn.Embedding(19, 1), nn.Linear(8, 8)

    def compute_bias(self, n: int, m: int, device: torch.device | None = None) -> Tensor:
        gap = torch.arange(n, device=device)[:, None] - torch.arange(m, device=device) + 9
        return self.relative_attention_bias(gap).permute(2, 0, 1)[None]  # type: ignore[no-any-return]


class T5Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Module()])
        self.layer[0].SelfAttention = Biased()

    def forward(self, x: Tensor, position_bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = (x @ x.mT)[:, None] + position_bias
        y = (scores.softmax(-1) @ x[:, None])[:, 0]
        return x + self.layer[0].SelfAttention.out(y), position_bias


class T5EncoderModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.embed_tokens, self.encoder.dropout = nn.Embedding(20, 8), nn.Dropout(0.0)
        self.encoder.block = nn.ModuleList(T5Block() for _ in range(2))
        self.encoder.final_layer_norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.encoder.embed_tokens(ids)
        bias = self.encoder.block[0].layer[0].SelfAttention.compute_bias(ids.shape[1], ids.shape[1])
        for block in self.encoder.block:
            x, _ = block(x, bias)
        return self.encoder.final_layer_norm(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [GPT2Model, T5EncoderModel])
def test_pieces_of_text_models_compute_what_the_whole_does(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, ids = kind(), torch.arange(10).reshape(2, 5)
    cut = stages(model)
    whole = model(ids)
    torch.testing.assert_close(cut.neck(Chain(*cut.parts)(ids)), whole)
    mask = torch.ones(2, 5).long()
    kept = cut.neck(Chain(*cut.parts)(ids, attention_mask=mask))
    torch.testing.assert_close(kept, whole)
    expected = whole[:, -1] if kind is GPT2Model else whole.mean(1)
    for named in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(call(cut.output, kept, named), expected)
    mask[1, 3:] = 0
    padded = cut.neck(Chain(*cut.parts)(ids, attention_mask=mask))
    short = cut.neck(Chain(*cut.parts)(ids[1:, :3]))
    torch.testing.assert_close(padded[1:, :3], short)
    last = call(cut.output, padded, {"attention_mask": mask})[1]
    torch.testing.assert_close(last, short[0, -1] if kind is GPT2Model else short[0].mean(0))


class Untraceable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def stage() -> list[nn.Module]:
    return [nn.Linear(3, 8), nn.Linear(8, 8)]


class Speechless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "untraceable": (
        lambda: stages(Untraceable(), names=["x"]),
        ValueError,
        "stages: `model` must be one that torch.fx traces, got Untraceable: symbolically traced "
        "variables cannot be used as inputs to control flow",
    ),
    "untraceable without a word": (
        lambda: stages(Speechless(), names=["x"]),
        ValueError,
        "stages: `model` must be one that torch.fx traces, got Speechless: AssertionError",
    ),
    "names of batches": (
        lambda: PerTask.named(a={"ids": 1}, b={"mask": 1}),
        ValueError,
        "PerTask: batches must have the same names, got ['ids'] of 'a', ['mask'] of 'b'.",
    ),
    "one expert for all": (
        lambda: SparseMoE(nn.Linear(4, 4), 4, n=2, k=2),  # type: ignore[arg-type]
        TypeError,
        "SparseMoE: `expert` must be a factory, which makes each expert anew, got Linear.",
    ),
    "no routed stage": (
        lambda: TaskRouted(stage(), {"a": nn.Identity()}),
        ValueError,
        "TaskRouted: `stages` must hold one whose `forward` names `task`, got none.",
    ),
    "no gain": (
        lambda: lookahead_affinity(lambda: {"a": torch.zeros(())}, [], 0.1),
        ValueError,
        "lookahead_affinity: `losses` must be > 0, got [0.0].",
    ),
    "no scale": (
        lambda: MTINet(Pyramid(), {"a": 1}, []),
        ValueError,
        "MTINet: `channels` must hold those of each map, got none.",
    ),
    "branches": (
        lambda: AutoMTL(stage(), {"a": nn.Identity()}, normal(2, 3), branches=("copy",)),
        ValueError,
        "AutoMTL: `branches` must hold 'specific', 'skip' or both, got ('copy',).",
    ),
    "free": (
        lambda: AutoMTL(stage(), {"a": nn.Identity()}, normal(2, 3)).policy.free_last(-1),
        ValueError,
        "Policy: `n` must be >= 0, got -1.",
    ),
    "kinds": (
        lambda: adapted(lora(2, kinds=(nn.BatchNorm2d,))),
        ValueError,
        "lora: `kinds` must be linear layers or convolutions, got BatchNorm2d.",
    ),
    "unlike structures": (
        lambda: CrossStitch(
            {"a": [Pyramid(), nn.Identity()], "b": [nn.Identity(), nn.Identity()]},
            {"a": MeanHead(1), "b": MeanHead(1)},
            granularity="layer",
        )(normal(2, 3, 8, 8)),
        ValueError,
        "CrossStitch: the outputs of `stages[0]` must be alike and hold tensors only, got list of "
        "'a', Tensor of 'b'.",
    ),
}


@pytest.mark.parametrize(("make", "kind", "sentence"), ERRORS.values(), ids=ERRORS)
def test_bad_values(make: Callable[[], object], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=f"^{re.escape(sentence)}$"):
        make()


def test_a_policy_without_skips_shares_or_copies() -> None:
    model = AutoMTL(stage(), {t: nn.Identity() for t in "ab"}, normal(2, 3), branches=("specific",))
    assert model.policy.legal.tolist() == [[True, True, False]] * 2


def test_heads_of_a_tree_are_copied_with_it() -> None:
    model = HPS(perceptron(3, 8), {"a": nn.Linear(8, 1)})
    heads = model._copied_heads()
    assert heads.keys() == {"a"}
    assert heads["a"] is not model.heads["a"]
