"""Every architecture on the networks people have, and how these are cut."""

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from backbone_cases import (
    ARCHITECTURES,
    BACKBONES,
    GAPS,
    TASKS,
    BertModel,
    Head,
    Patches,
    ResNet,
    SwinTransformer,
    VisionTransformer,
    build,
    conv,
    masks,
    pictures,
    sentences,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from arch_zoo import (
    MTAN,
    AutoMTL,
    CrossStitch,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
    PerTask,
    stages,
)
from arch_zoo.inputs import call

MATRIX = [(a, b) for a in ARCHITECTURES for b in BACKBONES if (a, b) not in GAPS]
every = pytest.mark.parametrize(("architecture", "name"), MATRIX)
TURN = {
    (architecture, name)  # every third pair: each architecture on two backbones at least
    for i, architecture in enumerate(ARCHITECTURES)
    for j, name in enumerate(BACKBONES)
    if (i + j) % 3 == 0
}
in_turn = pytest.mark.parametrize(
    ("architecture", "name"),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in TURN)) for pair in MATRIX],
)
close = torch.testing.assert_close


@in_turn
def test_forward_and_task_sets(architecture: str, name: str) -> None:
    model, backbone = build(architecture, name), BACKBONES[name]
    x, named = backbone.x(4, 1), backbone.named(4, 1)
    torch.manual_seed(0)
    outputs = model(x, **named)
    assert {t: tuple(y.shape) for t, y in outputs.items()} == {t: (4, n) for t, n in TASKS.items()}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    found: dict[str, set[str]] = {n: set() for n in names}
    for task, y in outputs.items():
        gradients = torch.autograd.grad(
            y.sin().sum(),
            [model.get_parameter(n) for n in names],
            retain_graph=True,
            allow_unused=True,
        )
        for n, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                found[n].add(task)
    sets = model.parameter_task_sets()
    assert {n: sets[n] for n in names} == {n: frozenset(tasks) for n, tasks in found.items()}


@in_turn
def test_a_batch_per_task(architecture: str, name: str) -> None:
    model, backbone = build(architecture, name).eval(), BACKBONES[name]
    xs = {task: backbone.x(3 + i, i) for i, task in enumerate(TASKS)}
    named = {task: backbone.named(3 + i, i) for i, task in enumerate(TASKS)}
    outputs = model(PerTask(xs), **PerTask.named(**named))
    for task in TASKS:
        close(outputs[task], model(xs[task], [task], **named[task])[task])


EXPORTED = [(a, b) for a, b in MATRIX if b != "graphs"]  # which is no input that a graph may have


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "name"), EXPORTED)
def test_exports_with_any_number_of_examples(architecture: str, name: str) -> None:
    model, backbone = build(architecture, name).eval(), BACKBONES[name]
    x, named = backbone.x(4, 1), backbone.named(4, 1)
    shapes = pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, (x, named))
    dynamic = {"x": shapes[0], **({"named": shapes[1]} if named else {})}
    exported = torch.export.export(model, (x,), named, dynamic_shapes=dynamic)
    module = exported.module(check_guards=not named)  # whose checks know no keywords
    other, given = backbone.x(7, 2), backbone.named(7, 2)
    close(module(other, **given), model(other, **given))


@pytest.mark.slow
@every
def test_compiles_whole(architecture: str, name: str) -> None:
    model, backbone = build(architecture, name).eval(), BACKBONES[name]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for n in (4, 3):
        x, named = backbone.x(n, 1), backbone.named(n, 1)
        close(compiled(x, **named), model(x, **named))
    torch.compiler.reset()


# ---------------------------------------------------------------------- cutting


WHOLE: dict[str, tuple[type[nn.Module], str, Any]] = {
    "ResNet": (ResNet, "NCHW", lambda m: m.fc),
    "Swin": (SwinTransformer, "NHWC", lambda m: m.head),
    "ViT": (VisionTransformer, "NLC", lambda m: m.head),
}


def through(cut: Any, x: Any, **named: Any) -> Any:
    for part in cut.parts:
        x = call(part, x, named)
    return x


@pytest.mark.parametrize("keep_stem", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_pieces_compute_what_the_whole_does(name: str, keep_stem: bool) -> None:
    kind, layout, classifier = WHOLE[name]
    model, x = kind().eval(), pictures(2, 0)
    cut = stages(model, keep_stem=keep_stem)
    assert cut.layout == layout
    assert torch.equal(classifier(model)(cut.output(cut.neck(through(cut, x)))), model(x))
    held = {id(p) for part in cut.parts for p in part.parameters()}
    assert held <= {id(p) for p in model.parameters()}
    assert not held & {id(p) for p in classifier(model).parameters()}
    assert len(stages(model, 2).parts) == 2


def test_pieces_of_text_models_take_the_mask() -> None:
    model, x, named = BertModel(), sentences(4, 0), masks(4, 0)
    assert torch.equal(through(stages(model), x, **named), model(x, **named))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.below = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.middle, self.up = conv(8, 8), nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(12, 8, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x).relu()
        high = self.below(low)
        high = self.middle(high) + high
        return self.last(torch.cat([self.up(high), low], 1))  # type: ignore[no-any-return]


def test_skips_go_along_with_a_cut_by_names() -> None:
    net, x = UNet(), pictures(2, 0)
    cut = stages(net, names=["down", "below", "middle"])
    assert len(cut.parts) == 4
    assert torch.equal(through(cut, x), net(x))
    heads: dict[str, nn.Module] = {t: nn.Conv2d(8, n, 1) for t, n in TASKS.items()}
    for model in (
        MTAN(cut.parts, heads, refine="conv"),
        LearningToBranch(cut.parts, heads),
        CrossStitch(cut.parts, heads, granularity="layer"),
    ):
        assert model.initialize(x)(x)["b"].shape == (2, 2, 16, 16)
    sentence = (
        "CrossStitch: `stages[1]` must return one tensor for units that look at channels, got "
        "tuple. Use `granularity='layer'`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        CrossStitch(cut.parts, heads)(x)


def test_a_network_that_is_not_known_needs_names() -> None:
    sentence = (
        "stages: `model` must be a known backbone, got UNet. Name the submodules after which to "
        "cut, `stages(model, names=[...])`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        stages(UNet())
    sentence = "stages: `names` must be modules that the model calls, got 'left'."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        stages(UNet(), names=["down", "left"])
    with pytest.raises(ValueError, match=r"^stages: `n` must be between 1 and 4, got 5\.$"):
        stages(ResNet(), 5)


@pytest.mark.parametrize("kind", [CrossStitch, MTAN, LearningToBranch])
def test_a_network_in_one_piece_is_refused(kind: type[MultiTaskModel]) -> None:
    heads = {task: Head(n, None) for task, n in TASKS.items()}
    sentence = (
        f"{kind.__name__}: `stages` must be several stages, got ResNet in one piece. Pass "
        "`arch_zoo.stages(backbone).parts`, or a list of its stages; a list of one keeps it whole."
    )
    for given in (ResNet(), ResNet):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            kind(given, heads)  # type: ignore[call-arg]
    assert kind([ResNet()], heads)  # type: ignore[call-arg]


# ---------------------------------------------------------------------- channels


@pytest.mark.parametrize("name", BACKBONES)
def test_units_and_masks_find_the_channels(name: str) -> None:
    stitched = build("CrossStitch", name)
    parts = list(stitched.networks["a"])
    backbone, widths = BACKBONES[name], []
    x, named = backbone.x(2, 0), backbone.named(2, 0)
    with torch.no_grad():
        for part in parts[:-1]:
            x = call(part, x, named)
            widths.append(x.shape[1 if x.ndim == 2 or backbone.layout in ("NCHW", "NCL") else -1])
    assert [unit.rows["a"].weight.shape[1] for unit in stitched.units.values()] == widths
    gate = build("MMoE", name).levels[0].gates["a"]
    assert gate.layers[0].in_features == widths[0]
    masks_of = build("MTAN", name).attention["a"]
    assert [m.excite.weight.shape[0] for m in list(masks_of)[:-1]] == widths


def test_a_layout_that_does_not_fit_is_an_error() -> None:
    parts = [nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)]
    heads = {task: Head(n, "NCL") for task, n in TASKS.items()}
    x = torch.ones(2, 2, 20)
    sentence = (
        "CrossStitch: `layout` must put the channels where `stages[0]` has its 8, got 'NLC' for "
        "[2, 8, 20]."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        CrossStitch(parts, heads, layout="NLC")(x)
    sentence = (
        "MTAN: `layout` must name the axes of all features but vectors, got 'NCHW' for features of "
        "3 axes."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        MTAN(parts, heads, layout="NCHW")(x)
    sentence = (
        "MTAN: `layout` must be None or one of 'NC', 'NCL', 'NLC', 'NCHW', 'NHWC', 'NCDHW', "
        "'NDHWC', got 'CHW'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        MTAN(parts, heads, layout="CHW")
    assert CrossStitch(parts, heads, layout="NCL")(x)["a"].shape == (2, 1)


# ---------------------------------------------------------------------- gaps, said clearly


def test_automtl_says_what_it_cannot_take() -> None:
    with pytest.raises(TypeError, match=r"^trace: `example` must be a tensor whose first axis"):
        build("AutoMTL", "graphs")
    heads = {task: Head(n, "NLC") for task, n in TASKS.items()}
    parts = BACKBONES["ViT"].stages()
    with pytest.raises(
        ValueError, match=r"^AutoMTL: `backbone` and `example_input` must hold numb"
    ):
        AutoMTL([copy.deepcopy(p).to("meta") for p in parts], heads, pictures(2, 0))


def test_a_network_found_by_a_search_heeds_the_mask() -> None:
    model, x, named = build("AutoMTL", "BERT").eval(), sentences(4, 0), masks(4, 0)
    choices = {"a": torch.eye(3)[[0, 1, 0]], "b": torch.eye(3)[[0, 0, 2]]}
    lowered = model.lower(choices)
    expected = model.decode(model.encode(x, choices=choices, **named))
    close(lowered(x, **named), expected)
    close(lowered(x, ["a"], **named), {"a": expected["a"]})
    other = x.clone()
    other[named["attention_mask"] == 0] = 0
    close(lowered(other, **named), expected)
    assert not torch.allclose(lowered(x)["a"], expected["a"])
    close(pickle.loads(pickle.dumps(lowered))(x, **named), expected)


class Table(nn.Module):
    """Reads a dict by its names, and takes the ids only once."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.dense = nn.Embedding(10, 8), nn.Linear(3, 8)
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.users(batch["user"]) + self.dense(batch["dense"])
        return x + self.second(self.first(x).relu())  # type: ignore[no-any-return]


def test_a_search_traces_a_network_that_reads_a_dict() -> None:
    torch.manual_seed(0)
    network, table = Table(), BACKBONES["table"].x
    model = AutoMTL(network, {t: nn.Linear(8, n) for t, n in TASKS.items()}, table(2, 0))
    assert model.operators == ("dense", "first", "second")
    assert model.policy.operations[:, 0].tolist() == [24, 256, 256]
    rows = {"a": torch.eye(3)[[0, 0, 1]], "b": torch.eye(3)[[0, 1, 0]]}
    lowered, x = model.lower(rows), table(5, 1)
    close(lowered(x), model.decode(model.encode(x, choices=rows)))
    close(lowered(PerTask(a=x, b=table(3, 2)))["b"], lowered(table(3, 2), ["b"])["b"])
    shared = model.lower()
    for task in TASKS:
        close(shared(x)[task], shared.heads[task](network(x)))

    class Loop(Table):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return super().forward({name: batch[name] for name in batch})

    with pytest.raises(ValueError, match=r"^trace: the backbone \(Loop\) cannot be traced: Proxy"):
        AutoMTL(Loop(), {t: nn.Linear(8, n) for t, n in TASKS.items()}, table(2, 0))


def test_automtl_searches_linear_layers_where_they_hold_the_network() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Patches()
            self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return x + self.second(self.first(x).relu())  # type: ignore[no-any-return]

    heads = {task: Head(n, "NLC") for task, n in TASKS.items()}
    model = AutoMTL(Mixer(), heads, pictures(2, 0))
    assert set(model.operators) == {"embed.proj", "first", "second"}

    class Hidden(nn.Module):
        """Its weights belong to no layer that is called with one input."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.large = nn.Conv2d(3, 8, 3), nn.Bilinear(8, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).flatten(2).mean(2)
            return self.large(y, y)  # type: ignore[no-any-return]

    sentence = "AutoMTL: the operators to search must hold at least 50% of the parameters of"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        AutoMTL(Hidden(), heads, pictures(2, 0))
    chosen = AutoMTL(Hidden(), heads, pictures(2, 0), searchable=lambda node, m: True)
    assert chosen.operators == ("conv",)


def test_gates_of_pretrained_experts_grow_apart() -> None:
    torch.manual_seed(0)
    pretrained = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    heads = {task: nn.Linear(8, 1) for task in TASKS}
    model = MMoE(lambda: copy.deepcopy(pretrained), heads, num_experts=3)
    x = pictures(16, 0)[:, :, 0, 0]
    model.initialize(x)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        sum(
            (y - x[:, :1].sin() * (n + 1)).square().mean() for n, y in enumerate(model(x).values())
        ).backward()
        optimizer.step()
    weights = [m[0].weight for m in model.levels[0].shared.to_modules()]
    assert (weights[0] - weights[1]).abs().max() > 1e-3
