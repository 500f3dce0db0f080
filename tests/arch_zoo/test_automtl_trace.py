"""A trace computes what the backbone does, in every mode and at every size, or says why not."""

import copy
import pickle
import random

import pytest
import torch
from backbones import BACKBONES, backbone, pictures
from torch import Tensor, fx, nn
from trace_cases import REFUSED, TRACED, Block, Depth, Subclass

from arch_zoo.automtl import trace

LIST = "the backbone as a list of blocks, which are searched as wholes"
X = pictures(2, (12, 9))


def around(block: nn.Module) -> nn.Sequential:
    """Return a backbone with the block in its middle."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), block, nn.Conv2d(8, 4, 1))


def outcome(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return outputs and gradients in training mode, and outputs in evaluation mode after it."""
    module = copy.deepcopy(module).train()
    torch.manual_seed(1)
    output = module(x)
    output.square().sum().backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return [output, *(gradients[name] for name in sorted(gradients)), module.eval()(x)]


def assert_sound(traced: fx.GraphModule, original: nn.Module, x: Tensor = X) -> None:
    for batch in (x, x[:1], torch.cat([x, x], dim=-1)):
        torch.testing.assert_close(outcome(traced, batch), outcome(original, batch))


def targets(traced: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "MobileNetV2")) for n in BACKBONES]
)
def test_backbones_are_traced_into_their_layers(name: str) -> None:
    model = backbone(name)
    traced = trace(model, pictures())
    torch.testing.assert_close(
        outcome(traced, pictures()), outcome(model, pictures()), rtol=0, atol=0
    )
    convolutions = {n for n, part in model.named_modules() if isinstance(part, nn.Conv2d)}
    assert convolutions <= set(targets(traced))
    assert traced.state_dict().keys() == model.state_dict().keys()
    assert all("tensor_meta" in node.meta for node in traced.graph.nodes)


@pytest.mark.parametrize("name", TRACED)
def test_what_can_be_traced_is_traced_right(name: str) -> None:
    model = around(TRACED[name]())
    assert_sound(trace(model, X), model)


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.__name__)
def test_what_cannot_be_traced_is_named_with_the_way_out(block: type[Block]) -> None:
    name = block.__name__
    cure = rf"Pass `leaves=\[{name}\]` to take it as one piece, or {LIST}\.$"
    with pytest.raises(ValueError, match=rf"^trace: `1` \({name}\) {REFUSED[block]}\. {cure}"):
        trace(around(block()), X)


@pytest.mark.slow
@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.__name__)
def test_both_ways_out_work(block: type[Block]) -> None:
    model = around(block())
    assert_sound(trace(model, X, leaves=[block]), model)
    traced = trace(list(model), X)
    assert targets(traced) == ["0", "1", "2"]
    assert_sound(traced, model)


def test_the_backbone_itself_may_be_to_blame() -> None:
    class Net(Depth):
        pass

    sentence = rf"^trace: the backbone \(Net\) {REFUSED[Depth]}\. Pass {LIST}\.$"
    with pytest.raises(ValueError, match=sentence):
        trace(Net(), torch.ones(2, 8, 5, 5))


def test_the_innermost_module_is_named() -> None:
    blocks = nn.ModuleDict({"deep": nn.Sequential(Subclass(), Depth())})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks["deep"](x) + 1  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"^trace: `blocks\.deep\.1` \(Depth\) draws"):
        trace(Net(), torch.ones(2, 8, 5, 5))


def test_a_value_that_the_block_makes_is_not_blamed_on_the_layer_that_takes_it() -> None:
    class Late(Block):
        """Remembers in Python how it was called last, which no graph can show."""

        shift = 0.0

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, fx.Proxy):
                return self.conv(x)  # type: ignore[no-any-return]
            return self.conv(x + 1.0)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"^trace: `1` \(Late\) computes something else"):
        trace(around(Late()), X)


def test_a_trace_that_fails_at_another_size_is_refused() -> None:
    class Grid(Block):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x, fx.Proxy):
                return self.conv(x) + torch.arange(9.0)  # type: ignore[no-any-return]
            return self.conv(x) + torch.arange(float(x.shape[-1]))  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"^trace: `1` \(Grid\) runs where its trace fails: The"):
        trace(around(Grid()), X)


def test_a_layer_that_writes_into_its_input_is_refused() -> None:
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_()

    sentence = (
        r"^trace: `1` \(Act\) writes into a tensor that it reads\. "
        r"Let it return a new tensor instead\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        trace(around(Act()), X)


def test_sizes_that_the_backbone_itself_refuses_are_not_asked_of_the_trace() -> None:
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 10 * 7, 5))
    traced = trace(fixed, X)
    torch.testing.assert_close(traced(X), fixed(X))


def test_one_example_will_do_where_training_needs_more() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))
    torch.testing.assert_close(outcome(trace(pooled, X[:1]), X), outcome(pooled, X))


def test_dropout_functions_follow_the_mode() -> None:
    traced = trace(around(TRACED["Dropouts"]()), X)
    names = [type(m).__name__ for m in traced.modules() if "Dropout" in type(m).__name__]
    assert names == ["Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout"]
    assert not any(
        "training" in node.kwargs for node in traced.graph.nodes if node.op == "call_function"
    )
    assert torch.equal(traced.eval()(X), traced(X))
    assert not torch.equal(traced.train()(X), traced(X))


def test_a_made_module_takes_no_name_that_is_taken() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Sequential(nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.dropout(x), 0.5, self.training)

    net = Net()
    assert_sound(trace(net, X), net)


def test_layers_stay_whole_and_calls_of_one_module_keep_one_name() -> None:
    assert targets(trace(around(Subclass()), X)) == ["0", "1.conv", "1.same", "2"]
    assert targets(trace(around(TRACED["Twice"]()), X)) == ["0", "1.conv", "1.conv", "2"]
    tied = trace(around(TRACED["Tied"]()), X)
    assert tied.get_parameter("1.conv.weight") is tied.get_parameter("1.other.weight")


@pytest.mark.parametrize("name", ["PreActivation", "Methods"])
def test_no_node_of_a_trace_writes_in_place(name: str) -> None:
    traced = trace(around(TRACED[name]()), X)

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            read = [self.env[source] for source in n.all_input_nodes]
            versions = [value._version for value in read]
            result = super().run_node(n)
            assert [value._version for value in read] == versions, n.format_node()
            return result

    Watching(traced).run(X)
    assert not any(getattr(part, "inplace", False) for part in traced.modules())


def test_nothing_of_the_user_changes() -> None:
    model = backbone("EfficientNet").train()
    model.get_submodule("features.0").eval()  # frozen statistics
    model.features.requires_grad_(False)  # type: ignore[operator]
    before = copy.deepcopy(model)
    generators = torch.get_rng_state(), random.getstate()
    traced = trace(model, pictures())
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
    for (name, old), new in zip(before.named_modules(), model.modules(), strict=True):
        assert old.training == new.training
        assert getattr(old, "inplace", None) == getattr(new, "inplace", None)
        assert not new._forward_hooks
        if name in dict(traced.named_modules()):
            assert traced.get_submodule(name).training == old.training
    for state in (model.state_dict(), traced.state_dict()):
        torch.testing.assert_close(dict(state), dict(before.state_dict()), rtol=0, atol=0)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in traced.parameters()}
    assert not any(p.requires_grad for p in traced.parameters())


@pytest.mark.slow
def test_traces_pickle_copy_and_compile() -> None:
    model = backbone("ResNet")
    traced = trace(model, pictures())
    for same in (
        pickle.loads(pickle.dumps(traced)),
        copy.deepcopy(traced),
        torch.compile(traced, backend="aot_eager", fullgraph=True),
        trace(traced, pictures()),
    ):
        torch.testing.assert_close(same.train()(pictures()), model.train()(pictures()))


def test_blocks_of_a_transformer_stay_whole() -> None:
    blocks = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
    tokens = torch.randn(3, 5, 8)
    traced = trace(nn.ModuleList(blocks), tokens)
    assert targets(traced) == ["0", "1"]
    torch.testing.assert_close(outcome(traced, tokens), outcome(nn.Sequential(*blocks), tokens))


def test_lazy_layers_are_sized_by_the_example() -> None:
    traced = trace(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), X)
    assert type(traced.get_submodule("0")) is nn.Conv2d
    assert traced(X).shape == (2, 4, 10, 7)


def test_the_backbones_own_error_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        trace(around(nn.Identity()), torch.ones(2, 7, 5, 5))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ([], X),
            "trace: `backbone` must be a module or a list of blocks, which are modules, got [].",
        ),
        (
            ([nn.ReLU(), 1], X),
            "trace: `backbone` must be a module or a list of blocks, which are modules, got "
            "[ReLU(), 1].",
        ),
        (
            (nn.ReLU(), [1.0]),
            "trace: `example` must be a tensor whose first axis is the batch, or a dict of such, "
            "got list.",
        ),
        (
            (nn.ReLU(), X, [nn.ReLU()]),
            "trace: `leaves` must be classes of modules, got ReLU().",
        ),
    ],
)
def test_wrong_arguments_are_told(arguments: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(TypeError) as error:
        trace(*arguments)  # type: ignore[arg-type]
    assert str(error.value) == sentence


def test_a_module_of_empty_modules_is_looked_into() -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shortcut = nn.Sequential()

        def forward(self, x: Tensor) -> Tensor:
            return self.shortcut(x).relu()  # type: ignore[no-any-return]

    assert targets(trace(around(Wraps()), X)) == ["0", "1.shortcut", "2"]


def test_several_outputs_are_refused() -> None:
    class Net(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.conv(x)

    sentence = (
        r"^trace: the backbone \(Net\) must return one tensor, got tuple\. "
        r"Wrap it in a module that returns one\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        trace(Net(), torch.ones(2, 8, 5, 5))
