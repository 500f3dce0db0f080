"""Architectures that must agree, in float64; most pairs share their very modules."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from zoo_cases import SIZES, WIDTH, Kit, choose

from arch_zoo import (
    CGC,
    HPS,
    MTAN,
    PLE,
    CrossStitch,
    DSelectK,
    ExpertBank,
    Features,
    Gate,
    LearningToBranch,
    MMoE,
    MultiTaskModel,
)
from arch_zoo.model import Inputs, Reach

EVEN = Gate(start="even")
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
kinds = pytest.mark.parametrize("kind", SIZES)


class Separate(MultiTaskModel):
    """One network per task and nothing shared: the reference for routes that never meet."""

    def __init__(self, networks: dict[str, nn.Module], heads: dict[str, nn.Module]) -> None:
        super().__init__(heads)
        self.networks = nn.ModuleDict(networks)

    def encode(self, x: Inputs, tasks: object = None) -> Features:
        return Features((), {t: self.networks[t](x) for t in tasks or self.tasks}, {})

    def reach(self) -> Reach:
        yield from ((network, (name,)) for name, network in self.networks.items())


def doubled(kind: str) -> tuple[Kit, dict[str, nn.Module], Tensor]:
    torch.manual_seed(0)
    kit = Kit(kind)
    return kit, nn.ModuleDict(kit.heads()).double(), kit.x().double()


def loop(*experts: nn.Module) -> ExpertBank:
    return ExpertBank([expert.double() for expert in experts], backend="loop")


def agree(left: MultiTaskModel, right: MultiTaskModel, x: Tensor, exact: bool = False) -> None:
    """Compare outputs, and gradients of each task on the parameters that both models have."""
    left.double().initialize(x), right.double().initialize(x)
    common = [p for p in left.parameters() if any(p is q for q in right.parameters())]
    assert common
    first, second = left(x), right(x)
    for task, y in first.items():
        close(y, second[task])
        assert not exact or torch.equal(y, second[task])
        gradients = [
            torch.autograd.grad(z.sin().sum(), common, retain_graph=True, materialize_grads=True)
            for z in (y, second[task])
        ]
        close(*gradients)


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


@kinds
def test_mmoe_of_one_expert_is_hps(kind: str) -> None:
    kit, heads, x = doubled(kind)
    encoder = kit.stage()
    agree(MMoE(loop(encoder), heads), HPS(encoder, heads), x)


@kinds
@pytest.mark.parametrize("condition", ["example", "task"])
def test_dselect_k_of_one_expert_is_hps(kind: str, condition: str) -> None:
    kit, heads, x = doubled(kind)
    encoder = kit.stage()
    agree(DSelectK(loop(encoder), heads, k=1, condition=condition), HPS(encoder, heads), x)


@kinds
def test_mmoe_is_the_written_formula(kind: str) -> None:
    kit, heads, x = doubled(kind)
    experts = [kit.stage() for _ in range(3)]
    model = MMoE(loop(*experts), heads, gate=EVEN).double().initialize(x)
    outputs = model(x)
    for task in model.tasks:
        linear = model.levels[0].gates[task].layers[0]
        nn.init.normal_(linear.weight)
        pool = x if kind == "vector" else x.mean((2, 3)) if kind == "image" else x.mean(1)
        weights = (pool @ linear.weight.T + linear.bias).exp()
        weights = weights / weights.sum(1, keepdim=True)
        z = sum(
            weights[:, e].reshape(-1, *[1] * (x.ndim - 1)) * f(x) for e, f in enumerate(experts)
        )
        close(model(x, [task])[task], heads[task](z))
        mean = sum(f(x) for f in experts) / 3
        close(outputs[task], heads[task](mean))  # gates start even


@kinds
def test_mmoe_with_a_gate_on_one_expert_is_hps(kind: str) -> None:
    kit, heads, x = doubled(kind)
    experts = [kit.stage() for _ in range(3)]
    model = MMoE(loop(*experts), heads).double().initialize(x)
    for gate in model.levels[0].gates.children():
        gate.layers[0].bias.data[1] = 1e4
    agree(model, HPS(experts[1], heads), x)


def test_mmoe_of_equal_experts_gives_gates_no_gradient() -> None:
    kit, heads, x = doubled("vector")
    encoder = kit.stage()
    model = MMoE(loop(encoder, encoder), heads).double().initialize(x)
    close(model(x)["a"], heads["a"](encoder(x)))
    gate = list(model.levels[0].gates["a"].parameters())
    for gradient in torch.autograd.grad(model(x)["a"].sum(), gate):
        assert gradient.abs().max() < 1e-12


def test_mmoe_does_not_care_for_the_order_of_experts() -> None:
    kit, heads, x = doubled("vector")
    experts = [kit.stage() for _ in range(3)]
    model = MMoE(loop(*experts), heads).double().initialize(x)
    turned = MMoE(loop(*experts[::-1]), heads).double().initialize(x)
    for task in model.tasks:
        ours, theirs = (m.levels[0].gates[task].layers[0] for m in (model, turned))
        nn.init.normal_(ours.weight)
        theirs.weight.data, theirs.bias.data = ours.weight.data.flip(0), ours.bias.data.flip(0)
    agree(model, turned, x)


@kinds
def test_pinned_selectors_are_a_dense_gate(kind: str) -> None:
    kit, heads, x = doubled(kind)
    experts = [kit.stage() for _ in range(4)]
    sparse = DSelectK(loop(*experts), heads, k=4, condition="task").double()
    dense = MMoE(loop(*experts), heads, gate=EVEN).double().initialize(x)
    for task in sparse.tasks:
        logits = sparse.levels[0].gates[task].logits
        for i in range(4):
            logits.data[i] = torch.tensor([i & 1, i >> 1, 0]) * 2.0 - 1
        logits.data[:, -1].normal_()
        dense.levels[0].gates[task].layers[0].bias.data = logits.data[:, -1].clone()
    agree(sparse, dense, x)


@kinds
def test_cgc_without_own_experts_is_mmoe(kind: str) -> None:
    kit, heads, x = doubled(kind)
    cgc = CGC(kit.stage, heads, num_shared=3, num_specific=0).double().initialize(x)
    mmoe = MMoE(cgc.levels[0].shared, heads).double()
    mmoe.levels[0].gates = cgc.levels[0].gates
    for gate in cgc.levels[0].gates.children():
        nn.init.normal_(gate.layers[0].weight)
    agree(cgc, mmoe, x)


@kinds
def test_cgc_without_shared_experts_is_separate_networks(kind: str) -> None:
    kit, heads, x = doubled(kind)
    experts = {task: kit.stage() for task in heads}
    cgc = CGC(kit.stage, heads, num_shared=0, num_specific=1)
    for task, expert in experts.items():
        cgc.levels[0].specific[task] = loop(expert)
    agree(cgc, Separate(experts, heads), x)


@kinds
@pytest.mark.parametrize("shared_stream", [True, False])
def test_ple_of_one_level_is_cgc(kind: str, shared_stream: bool) -> None:
    kit, heads, x = doubled(kind)
    sizes = {"num_shared": 2, "num_specific": {"a": 0, "b": 1, "c": 2}}
    ple = PLE([kit.stage], heads, shared_stream=shared_stream, **sizes).double().initialize(x)
    cgc = CGC(kit.stage, heads, **sizes)
    cgc.levels = ple.levels
    for gate in cgc.levels[0].gates.children():
        nn.init.normal_(gate.layers[0].weight)
    agree(ple, cgc, x)


@kinds
@pytest.mark.parametrize("shared_stream", [True, False])
def test_ple_of_one_shared_expert_per_level_is_hps(kind: str, shared_stream: bool) -> None:
    kit, heads, x = doubled(kind)
    ple = PLE(kit.factories(3), heads, num_shared=1, num_specific=0, shared_stream=shared_stream)
    stages = [kit.stage(depth) for depth in range(3)]
    for level, stage in zip(ple.levels, stages, strict=True):
        level.shared = loop(stage)
    agree(ple, HPS(stages, heads), x)


def slow_ple(model: PLE, x: Tensor) -> dict[str, Tensor]:
    """Follow the paper's equations for vectors, an expert at a time."""

    def gated(gate: nn.Module, stream: Tensor, experts: list[Tensor]) -> Tensor:
        weights = torch.softmax(gate.layers[0](stream), dim=1)
        return sum(weights[:, i : i + 1] * expert for i, expert in enumerate(experts))

    streams, shared = dict.fromkeys(model.tasks, x), x
    for level in model.levels:
        common = [expert(shared) for expert in level.shared.to_modules()]
        own = {
            t: [f(streams[t]) for f in level.specific[t].to_modules()]
            if t in level.specific
            else []
            for t in model.tasks
        }
        if level.shared_gate is not None:
            following = gated(
                level.shared_gate, shared, [z for zs in own.values() for z in zs] + common
            )
        streams = {t: gated(level.gates[t], streams[t], own[t] + common) for t in model.tasks}
        shared = following
    return {t: model.heads[t](z) for t, z in streams.items()}


@pytest.mark.parametrize("specific", [1, {"a": 2, "b": 0, "c": 1}])
def test_ple_is_the_written_formula(specific: int | dict[str, int]) -> None:
    kit, heads, x = doubled("vector")
    model = PLE(kit.factories(3), heads, num_shared=2, num_specific=specific).double()
    model.initialize(x)
    for level in model.levels:
        for gate in [*level.gates.children(), level.shared_gate]:
            if gate is not None:
                nn.init.normal_(gate.layers[0].weight)
    outputs, expected = model(x), slow_ple(model, x)
    for task in model.tasks:
        close(outputs[task], expected[task])


def test_ple_has_the_parameters_of_the_paper() -> None:
    kit = Kit("vector")
    model = PLE(kit.factories(3), {"a": nn.Identity(), "b": nn.Identity()}, num_shared=2,
                num_specific={"a": 1, "b": 3}).initialize(kit.x())  # fmt: skip
    inputs = [3, WIDTH, WIDTH]
    experts = sum((d + 1) * WIDTH * (1 + 3 + 2) for d in inputs)
    gates = sum((d + 1) * (1 + 2 + 3 + 2) for d in inputs)
    shared_gates = sum((d + 1) * (1 + 3 + 2) for d in inputs[:-1])
    assert sum(p.numel() for p in model.parameters()) == experts + gates + shared_gates


@kinds
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_cross_stitch_of_identities_is_separate_networks(kind: str, granularity: str) -> None:
    kit, heads, x = doubled(kind)
    networks = {t: nn.Sequential(*[kit.stage(d) for d in range(3)]) for t in heads}
    model = CrossStitch(networks, heads, granularity=granularity, self_weight=1.0, stitch_last=True)
    agree(model, Separate(networks, heads), x, exact=True)
    others = [*networks["b"].parameters()]
    for gradient in torch.autograd.grad(model(x)["a"].sin().sum(), others):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    row = model.units["0"].rows["a"].weight
    assert (torch.autograd.grad(model(x)["a"].sin().sum(), row)[0] != 0).all()


@kinds
@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_cross_stitch_of_equal_networks_is_hps(kind: str, granularity: str) -> None:
    kit, heads, x = doubled(kind)
    stages = nn.Sequential(kit.stage(0), kit.stage(1)).double()
    model = CrossStitch(stages, heads, granularity=granularity).double().initialize(x)
    for row in model.architecture_parameters():
        row.data.normal_()
        row.data /= row.data.sum(0)
    outputs, expected = model(x), HPS(stages, heads)(x)
    for task in model.tasks:
        close(outputs[task], expected[task])


def test_cross_stitch_channels_alike_are_a_layer() -> None:
    kit, heads, x = doubled("tokens")
    networks = {t: nn.Sequential(kit.stage(0), kit.stage(1)) for t in heads}
    channel = CrossStitch(networks, heads).double().initialize(x)
    layer = CrossStitch(networks, heads, granularity="layer").double()
    for task in heads:
        row = layer.units["0"].rows[task].weight.data.normal_()
        channel.units["0"].rows[task].weight.data = row.unsqueeze(1).expand(-1, WIDTH).clone()
    agree(channel, layer, x)


def test_cross_stitch_does_not_care_for_the_order_of_tasks() -> None:
    kit, heads, x = doubled("image")
    networks = {t: nn.Sequential(kit.stage(0), kit.stage(1)) for t in heads}
    turned = {t: heads[t] for t in reversed(list(heads))}
    agree(CrossStitch(networks, heads), CrossStitch(networks, turned), x)


@kinds
@pytest.mark.parametrize("refine", ["residual", "conv", None])
def test_mtan_with_open_masks_is_hps(kind: str, refine: str | None) -> None:
    kit, heads, x = doubled(kind)
    stages = [nn.Sequential(kit.stage(0), kit.stage(1)), kit.stage(1)]
    model = MTAN(stages, heads, refine=refine).double().initialize(x)
    for masks in model.attention.children():
        fill(masks[-1].excite.norm, 0.0)
        fill(nn.ParameterList([masks[-1].excite.norm.bias]), 50.0)
    agree(model, HPS(stages, heads), x)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_ltb_on_the_diagonal_is_separate_networks(kind: str, training: bool) -> None:
    kit, heads, x = doubled(kind)
    model = LearningToBranch(kit.factories(3), heads).double()
    choose(model, {t: (i, i, i) for i, t in enumerate(heads)})
    networks = {t: nn.Sequential(*[n[i] for n in model.nodes]) for i, t in enumerate(heads)}
    agree(model.train(training), Separate(networks, heads), x)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_ltb_of_first_parents_is_hps(kind: str, training: bool) -> None:
    kit, heads, x = doubled(kind)
    model = LearningToBranch(kit.factories(3), heads, hard=False).double()
    choose(model, dict.fromkeys(heads, (0, 0, 0)))
    agree(model.train(training), HPS([nodes[0] for nodes in model.nodes], heads), x)


@kinds
def test_ltb_lowered_is_the_evaluated_supernet(kind: str) -> None:
    kit, heads, x = doubled(kind)
    model = LearningToBranch(kit.factories(3), heads, nodes_per_stage=[1, 3, 4]).double()
    choose(model, {"a": (0, 1, 0), "b": (0, 1, 3), "c": (0, 2, 2)})
    tree = model.eval().lower()
    outputs, expected = tree(x), model(x)
    for task in heads:
        close(outputs[task], expected[task])
    assert [sorted(nodes) for nodes in tree.nodes] == [["0"], ["1", "2"], ["0", "2", "3"]]
    sets = tree.parameter_task_sets()
    assert sets["nodes.0.0.0.weight"] == {"a", "b", "c"}
    assert sets["nodes.1.1.0.weight"] == {"a", "b"}
    assert all(sets.values())
    assert not {id(p) for p in tree.parameters()} & {id(p) for p in model.parameters()}
