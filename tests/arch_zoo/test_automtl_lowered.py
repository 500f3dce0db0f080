"""Lowered models of AutoMTL: what choices make of a supermodel."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from automtl_cases import SOME, all_take, build, calls, drawn, images, perturb, same, size
from backbones import StochasticDepth, backbone
from torch import Tensor, nn

from arch_zoo import HPS, AutoMTL, MultiTaskModel

each = pytest.mark.parametrize("name", SOME)
norms = pytest.mark.parametrize("norm", ["shared", pytest.param("task", marks=pytest.mark.slow)])
draws = pytest.mark.parametrize("seed", [3, pytest.param(8, marks=pytest.mark.slow)])


def sets_found(model: MultiTaskModel) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {n: set() for n, _ in model.named_parameters()}
    for task, y in model(images()).items():
        gradients = torch.autograd.grad(
            y.sin().sum(), list(model.parameters()), allow_unused=True, retain_graph=True
        )
        for n, gradient in zip(found, gradients, strict=True):
            if gradient is not None:
                found[n].add(task)
    return {n: frozenset(tasks) for n, tasks in found.items()}


# ---------------------------------------------------------------------- two ends


def network_of(name: str) -> nn.Module:
    """Return the backbone of the supermodels here, with the weights that they start from."""
    network = backbone(name).double()
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return network


@each
@pytest.mark.parametrize("training", [True, False])
def test_all_shared_is_hard_parameter_sharing(name: str, training: bool) -> None:
    model = build(name)
    low = model.lower(all_take(model, "shared")).train(training)
    hps = HPS(network_of(name), copy.deepcopy(dict(low.heads.items()))).train(training)
    counts = calls(low, images()), calls(hps, images())
    assert sorted(counts[0].values()) == sorted(counts[1].values())
    same(low(images()), hps(images()))
    assert size(low) == size(hps)
    assert all(len(tasks) in (1, 3) for tasks in low.parameter_task_sets().values())
    assert {flat(n) for n, _ in low.named_parameters() if "heads" not in n} == {
        flat(n) for n, _ in hps.named_parameters() if "heads" not in n
    }
    for task in "abc":
        loss, wanted = (m(images())[task].sin().sum() for m in (low, hps))
        left = by_name(low, loss)
        assert all(torch.equal(g, left[n]) for n, g in by_name(hps, wanted).items())


def flat(path: str, task: str = "a") -> str:
    """Return a name under which a parameter of a network is found when it is lowered, too."""
    kept = path.removeprefix("network.").removeprefix("encoder.")
    return kept.replace(f".specific.{task}.", ".").replace(".shared.", ".").replace(".", "_")


def by_name(model: nn.Module, loss: Tensor, task: str = "a") -> dict[str, Tensor]:
    named = {flat(n, task): p for n, p in model.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


@each
@norms
def test_all_specific_is_a_network_for_each_task(name: str, norm: str) -> None:
    def everything(node: object, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d)  # squeeze-excite too, which is shared else

    model = build(name, norm=norm, searchable=everything)
    perturb(model)
    low = model.lower(all_take(model, "specific"))
    assert size(low.network) == 3 * size(network_of(name))
    assert not list(low.shared_parameters())
    outputs = low(images())
    for task in low.tasks:
        state = {flat(n, task): value for n, value in low.state_dict().items()}
        alone = HPS(network_of(name), {task: copy.deepcopy(low.heads[task])})
        alone.load_state_dict({n: state[flat(n)] for n in alone.state_dict()})
        expected = alone(images())[task]
        assert torch.equal(outputs[task], expected)
        left = by_name(low, outputs[task].sin().sum(), task)
        right = by_name(alone, expected.sin().sum())
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n], gradient) for n, gradient in right.items())


# ---------------------------------------------------------------------- in between


@each
@norms
@draws
def test_lowered_computes_what_the_supermodel_does(name: str, norm: str, seed: int) -> None:
    model = build(name, norm=norm)
    perturb(model)
    choices = drawn(model, seed)
    low = model.lower(choices)
    assert low.training
    with torch.no_grad():
        same(low(images()), model(images(), choices=choices))
    model.eval()
    low = model.lower(choices)
    assert not low.training
    for x in (images(), images(1, (33, 24))):
        same(low(x), model(x, choices=choices))
        for tasks in (["b"], ["c", "a"]):
            same(low(x, tasks), model(x, tasks, choices=choices))


@each
@norms
@draws
def test_task_sets_are_what_autograd_finds(name: str, norm: str, seed: int) -> None:
    model = build(name, norm=norm)
    low = model.lower(drawn(model, seed))
    assert low.parameter_task_sets() == sets_found(low)
    assert pickle.loads(pickle.dumps(low)).parameter_task_sets() == low.parameter_task_sets()


def test_some_parameters_are_shared_by_some_tasks() -> None:
    model = build("ResNet")
    choices = all_take(model, "shared")
    choices["c"][model.operators.index("layer2.0.conv1")] = torch.tensor([0.0, 1.0, 0.0])
    sets = model.lower(choices).parameter_task_sets()
    assert sets["network.conv1.shared.weight"] == {"a", "b", "c"}
    assert sets["network.layer2_0_conv1.shared.weight"] == {"a", "b"}
    assert sets["network.layer2_0_conv1.specific.c.weight"] == {"c"}
    assert sets["network.layer2_0_bn1.specific.a.weight"] == {"a", "b"}
    assert sets["network.layer2_0_conv2.shared.weight"] == {"a", "b", "c"}


@each
@norms
@draws
def test_nothing_unused_is_kept_and_nothing_runs_twice(name: str, norm: str, seed: int) -> None:
    model = build(name, norm=norm)
    choices = drawn(model, seed)
    low = model.lower(choices)
    counts = calls(low, images())
    holding = {n.rpartition(".")[0] for n in low.state_dict()}
    assert holding <= set(counts)
    seen = set()
    for node in low.network.graph.nodes:
        if node.op == "call_module":
            call = (node.target, *node.all_input_nodes)
            assert call not in seen or "relu" in node.target
            seen.add(call)
    for number, operator in enumerate(model.operators):
        taken = {task: int(rows[number].argmax()) for task, rows in choices.items()}
        kept = {n for n in holding if n.startswith(f"network.{operator.replace('.', '_')}.")}
        assert (f"network.{operator.replace('.', '_')}.shared" in kept) == (0 in taken.values())
        for task, branch in taken.items():
            specific = f"network.{operator.replace('.', '_')}.specific.{task}"
            assert (specific in kept) == (branch == 1)


def test_names_of_what_is_kept() -> None:
    model = build("ResNet")
    choices = all_take(model, "shared")
    choices["c"][model.operators.index("layer1.0.conv1")] = torch.tensor([0.0, 1.0, 0.0])
    names = {n.rpartition(".")[0] for n in model.lower(choices).state_dict()}
    assert {
        "network.conv1.shared",
        "network.bn1.shared",
        "network.layer1_0_conv1.shared",
        "network.layer1_0_conv1.specific.c",
        "network.layer1_0_bn1.specific.a",  # of a and b
        "network.layer1_0_bn1.specific.c",
        "network.layer1_0_conv2.shared",
    } <= names
    assert "network.layer1_0_bn1.specific.b" not in names


@norms
def test_statistics_of_tasks_that_have_parted_are_apart(norm: str) -> None:
    model = build("ResNet", norm=norm)
    low = model.lower(drawn(model, 3))
    norm_calls = Counter(
        node.target
        for node in low.network.graph.nodes
        if isinstance(node.target, str)
        and node.op == "call_module"
        and isinstance(low.network.get_submodule(node.target), nn.BatchNorm2d)
    )
    assert set(norm_calls.values()) == {1}


@each
def test_lowering_repeats_and_changes_nothing(name: str) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    code = model.network.code
    first, second = (model.lower(drawn(model, 3)) for _ in range(2))
    assert first.network.code == second.network.code
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(v, second.state_dict()[n]) for n, v in first.state_dict().items())
    own = {id(p) for p in model.parameters()} | {id(p) for p in second.parameters()}
    assert own.isdisjoint(map(id, first.parameters()))
    first(images())
    assert model.network.code == code
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_lowering_again_what_all_tasks_share_gives_the_same() -> None:
    model = build("ResNet").eval()
    low = model.lower(all_take(model, "shared"))

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = low.network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)["a"]  # type: ignore[no-any-return]

    again = AutoMTL(First(), dict(low.heads.items()), images()).double().eval().lower()
    same(again(images()), low(images()))
    assert size(again) == size(low)
    assert next(again.network.parameters()).shape == (8, 3, 3, 3)
