"""`arch_zoo` on backbones of torchvision, timm, transformers and PyG, without any weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradbal
from arch_zoo import (
    HPS,
    MTAN,
    PLE,
    Adapted,
    CrossStitch,
    Gate,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
    lora,
    stages,
)
from arch_zoo.encoders import Chain
from arch_zoo.tensors import pooled

torchvision = pytest.importorskip("torchvision", reason="cuts backbones of torchvision")
timm = pytest.importorskip("timm", reason="cuts backbones of timm")
transformers = pytest.importorskip("transformers", reason="cuts text models")

pytestmark = pytest.mark.filterwarnings("ignore")  # those libraries warn of much

models = torchvision.models
SMALL_TEXT = {"num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 3}


def swin() -> nn.Module:
    return models.SwinTransformer([4, 4], 24, [1, 1, 1, 1], [2, 2, 2, 2], [2, 2])  # type: ignore[no-any-return]


def vit() -> nn.Module:
    return models.VisionTransformer(64, 16, 4, 2, 32, 64)  # type: ignore[no-any-return]


PICTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]] = {
    "torchvision ResNet": (models.resnet18, lambda m: m.fc),
    "torchvision MobileNetV2": (models.mobilenet_v2, lambda m: m.classifier),
    "torchvision MobileNetV3": (models.mobilenet_v3_small, lambda m: m.classifier),
    "torchvision EfficientNet": (models.efficientnet_b0, lambda m: m.classifier),
    "torchvision ConvNeXt": (models.convnext_tiny, lambda m: m.classifier[2]),
    "torchvision Swin": (swin, lambda m: m.head),
    "torchvision ViT": (vit, lambda m: m.heads),
    **{
        f"timm {name}": (
            lambda name=name, options=options: timm.create_model(name, **options),
            lambda m: m.get_classifier(),
        )
        for name, options in {
            "resnet18": {},
            "mobilenetv2_100": {},
            "mobilenetv3_small_100": {},
            "efficientnet_b0": {},
            "convnext_atto": {},
            "vit_tiny_patch16_224": {"img_size": 64},
            "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
        }.items()
    },
}


@pytest.mark.parametrize("name", PICTURES)
def test_pieces_compute_what_the_whole_does(name: str) -> None:
    torch.manual_seed(0)
    make, classifier = PICTURES[name]
    model, x = make().eval(), torch.randn(2, 3, 64, 64)
    cut = stages(model)
    with torch.no_grad():
        whole = model(x)
        assert torch.equal(classifier(model)(cut.output(cut.neck(Chain(*cut.parts)(x)))), whole)


def bert() -> nn.Module:
    config = transformers.BertConfig(hidden_size=32, vocab_size=100, **SMALL_TEXT)
    return transformers.BertModel(config)  # type: ignore[no-any-return]


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(hidden_size=32, vocab_size=100, **SMALL_TEXT)
    return transformers.RobertaModel(config)  # type: ignore[no-any-return]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_layer=3, vocab_size=100)
    return transformers.GPT2Model(config)  # type: ignore[no-any-return]


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 3}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=100, **sizes))  # type: ignore[no-any-return]


TEXT = {"BERT": bert, "RoBERTa": roberta, "GPT-2": gpt2, "T5": t5}


def sentences() -> dict[str, Tensor]:
    ids = torch.randint(5, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", TEXT)
def test_pieces_of_text_models_compute_what_the_whole_does(name: str) -> None:
    torch.manual_seed(0)
    model, tokens = TEXT[name]().eval(), sentences()
    cut, mask = stages(model), tokens["attention_mask"]
    with torch.no_grad():
        for named in ({"attention_mask": mask}, {}):
            whole = model(tokens["input_ids"], **named).last_hidden_state
            pieces = cut.neck(Chain(*cut.parts)(tokens["input_ids"], **named))
            kept = mask > 0 if named else torch.ones_like(mask) > 0
            assert torch.equal(pieces[kept], whole[kept])


class Head(nn.Module):
    def __init__(self, width: int, outputs: int, layout: str) -> None:
        super().__init__()
        self.layout, self.linear = layout, nn.Linear(width, outputs)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.linear(pooled(x, attention_mask, self.layout))  # type: ignore[no-any-return]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-18": (models.resnet18, 512),
    "ViT": (vit, 32),
    "Swin": (swin, 192),
    "BERT": (bert, 32),
}


def parts(name: str) -> list[nn.Module]:
    return stages(NETWORKS[name][0]()).parts


def above(name: str) -> list[nn.Module]:
    return parts(name)[1:]


ARCHITECTURES: dict[str, Callable[[str, dict[str, nn.Module], Gate], MultiTaskModel]] = {
    "HPS": lambda name, heads, gate: HPS(parts(name), heads),
    "CrossStitch": lambda name, heads, gate: CrossStitch(lambda: parts(name), heads),
    "MTAN": lambda name, heads, gate: MTAN(parts(name), heads),
    "LearningToBranch": lambda name, heads, gate: LearningToBranch(lambda: parts(name), heads),
    "MMoE": lambda name, heads, gate: MMoE(
        lambda: above(name), heads, num_experts=2, stem=parts(name)[0], gate=gate
    ),
    "PLE": lambda name, heads, gate: PLE(
        [lambda: above(name)], heads, num_shared=1, num_specific=1, stem=parts(name)[0], gate=gate
    ),
    "Adapted": lambda name, heads, gate: Adapted(
        parts(name), heads, [lora(2, names=r"^(?!.*attn).*$")]
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_take_a_step(architecture: str, name: str) -> None:
    torch.manual_seed(0)
    layout = stages(NETWORKS[name][0]()).layout
    heads: dict[str, nn.Module] = {
        task: Head(NETWORKS[name][1], n, layout) for task, n in (("a", 1), ("b", 2))
    }
    model = ARCHITECTURES[architecture](name, heads, Gate(layout=layout))
    tokens = sentences()
    x = tokens["input_ids"] if name == "BERT" else torch.randn(2, 3, 64, 64)
    named = {"attention_mask": tokens["attention_mask"]} if name == "BERT" else {}
    model.initialize(x, **named).eval()  # statistics of two pictures would tell little
    optimizer = gradbal.MTLOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), "upgrad")
    outputs = model(x, **named)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found: dict[str, set[str]] = {n: set() for n in names}
    for task, y in outputs.items():
        given = [model.get_parameter(n) for n in names]
        slopes = torch.autograd.grad(y.sum(), given, retain_graph=True, allow_unused=True)
        for n, slope in zip(names, slopes, strict=True):
            if slope is not None:
                found[n].add(task)
    sets = model.parameter_task_sets()
    # a norm after the last block and a pooler are used by nothing here
    assert {n: sets[n] for n in names if found[n]} == {n: s for n, s in found.items() if s}
    optimizer.step({task: y.square().mean() for task, y in outputs.items()})
    assert all(p.isfinite().all() for p in model.parameters())


def test_graphs_of_pyg() -> None:
    geometric = pytest.importorskip("torch_geometric", reason="reads batches of graphs")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = geometric.nn.GCNConv(3, 8)

        def forward(self, batch: Any) -> Tensor:
            h = self.conv(batch.x, batch.edge_index).relu()
            return geometric.nn.global_add_pool(h, batch.batch)  # type: ignore[no-any-return]

    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graph = geometric.data.Data(x=torch.randn(3, 3), edge_index=edges)
    batch = geometric.data.Batch.from_data_list([graph, graph, graph])
    heads = {task: nn.Linear(8, 1) for task in "ab"}
    gate = Gate(lambda b: geometric.nn.global_mean_pool(b.x, b.batch))
    for model in (HPS(Net(), heads), MMoE(Net, heads, num_experts=2, gate=gate)):
        assert model.initialize(batch)(batch)["a"].shape == (3, 1)
        assert model({"a": batch, "b": batch})["b"].shape == (3, 1)


def test_the_head_of_deeplab_is_torchvisions() -> None:
    from arch_zoo import DeepLabHead

    torch.manual_seed(0)
    theirs = models.segmentation.deeplabv3.DeepLabHead(6, 5).eval()
    ours, x = DeepLabHead(5), torch.randn(2, 6, 33, 25)
    ours(x)
    pairs = zip(ours.eval().state_dict().values(), theirs.state_dict().values(), strict=True)
    for mine, value in pairs:
        mine.copy_(value)
    torch.testing.assert_close(ours(x), theirs(x))
