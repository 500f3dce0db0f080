"""The supermodel of AutoMTL: branches, gradients, what it runs."""

import copy
import io
import pickle

import pytest
import torch
from automtl_cases import SOME, all_take, build, close, drawn, heads, images, perturb, same
from backbones import backbone, pictures
from torch import Tensor, nn

from arch_zoo import HPS, AutoMTL
from arch_zoo.automtl import DepthWeighted, ExpectedCost
from arch_zoo.automtl.operators import Operator, Pass, PerTask

each = pytest.mark.parametrize("name", SOME)
norms = pytest.mark.parametrize("norm", ["shared", pytest.param("task", marks=pytest.mark.slow)])


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients that exist, by name of the parameter."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


# ---------------------------------------------------------------------- values


@each
@norms
def test_all_shared_is_the_backbone(name: str, norm: str) -> None:
    model = build(name, norm=norm)
    plain = HPS(copy.deepcopy(backbone(name)).double(), dict(model.heads.items())).eval()
    model.eval()
    same(model(images(), choices=all_take(model, "shared")), plain(images()))
    same(model(images()), plain(images()))  # logits start even, and the first of equals is shared


def test_branches_are_mixed_by_their_probabilities() -> None:
    model = build("MobileNetV2").eval()
    perturb(model)
    operator = next(m for m in model.network.children() if isinstance(m, Operator))
    x, shares = images(), torch.randn(10, 3).double()
    for task in "abc":
        parts = operator.shared, operator.specific[task], operator.skips[task]
        expected = torch.stack([p * part(x) for p, part in zip(shares[0], parts, strict=True)])
        torch.testing.assert_close(operator(x, shares, Pass(task)), expected.sum(dim=0))


@norms
def test_copies_start_as_the_shared_operators_and_part_from_them(norm: str) -> None:
    model = build("ResNet", norm=norm).eval()
    shared, specific = (all_take(model, branch) for branch in ("shared", "specific"))
    same(model(images(), choices=shared), model(images(), choices=specific))
    perturb(model)
    left, right = (model(images(), choices=choices) for choices in (shared, specific))
    assert not any(torch.allclose(left[task], right[task]) for task in "abc")


def test_the_backbone_is_copied() -> None:
    network = backbone("ResNet")
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    model = AutoMTL(network, heads(), pictures())
    model(pictures())
    assert all(torch.equal(value, before[n]) for n, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert {id(p) for p in model.network.parameters()}.isdisjoint(map(id, network.parameters()))


def test_activations_in_place_do_not_change_results() -> None:
    model = build("ResNet").eval()  # its blocks add in place and activate in place
    perturb(model)
    choices = all_take(model, "skip")
    x = images()
    first = model(x, choices=choices)
    assert torch.equal(x, images())
    same(model(x, ["c", "a"], choices=choices), {task: first[task] for task in "ca"})
    low = model.lower(choices)
    same(low(x), first)
    assert torch.equal(x, images())


@norms
def test_other_sizes_of_pictures(norm: str) -> None:
    model = build("EfficientNet", norm=norm)
    for size in [(33, 16), (17, 64), (50, 49)]:
        assert model(images(2, size))["c"].shape == (2, 3)


# ---------------------------------------------------------------------- samples


def test_one_sample_serves_forward_pass_and_regulariser() -> None:
    model = build("ResNet", norm="task")
    torch.manual_seed(5)
    outputs, aux = model(images(), return_aux=True)
    torch.manual_seed(5)
    sample = model.policy.sample()
    close(outputs, model(images(), choices=sample))
    expected = DepthWeighted()(sample, model.policy)
    torch.testing.assert_close(aux["policy"], expected)
    batches = {task: images(seed=n) for n, task in enumerate("abc")}
    torch.manual_seed(5)
    outputs, aux = model(batches, return_aux=True)
    torch.testing.assert_close(aux["policy"], expected)
    for task, batch in batches.items():
        close(model(batch, [task], choices=sample), {task: outputs[task]})


def test_regulariser_of_some_tasks_and_of_ones_choice() -> None:
    model = build("ResNet", regulariser=ExpectedCost())
    torch.manual_seed(5)
    _, aux = model(images(), ["b"], return_aux=True)
    torch.manual_seed(5)
    sample = model.policy.sample()
    expected = ExpectedCost()({"b": sample["b"]}, model.policy)
    torch.testing.assert_close(aux["policy"], expected)


def test_no_regulariser_with_given_choices_nor_in_evaluation() -> None:
    model = build("ResNet")
    uniform = model.policy.uniform()
    assert model(images(), return_aux=True, choices=uniform)[1] == {}
    assert model(images(), [], return_aux=True) == ({}, {})
    model.eval()
    assert model(images(), return_aux=True)[1] == {}
    model.policy.logits["a"].data[:, 1] = 1.0
    same(model(images()), model(images(), choices=model.policy.argmax()))


def test_pretraining_takes_the_mean_of_the_branches() -> None:
    model = build("ResNet").eval()
    perturb(model)
    thirds = {task: torch.full((10, 3), 1 / 3, dtype=torch.float64) for task in "abc"}
    close(model(images(), choices=model.policy.uniform()), model(images(), choices=thirds))


# ---------------------------------------------------------------------- gradients


@each
@norms
def test_task_sets_are_what_autograd_finds(name: str, norm: str) -> None:
    model = build(name, norm=norm)
    outputs = model(images())
    found: dict[str, set[str]] = {n: set() for n, _ in model.named_parameters()}
    for task, y in outputs.items():
        for n in gradients(y.sin().sum(), model):
            found[n].add(task)
    assert model.parameter_task_sets() == {n: frozenset(tasks) for n, tasks in found.items()}
    shared = {id(p) for p in model.shared_parameters()}
    assert shared.isdisjoint(map(id, model.architecture_parameters()))


def test_logits_learn_from_their_own_task_and_the_regulariser_alone() -> None:
    model = build("MobileNetV2")
    outputs, aux = model(images(), return_aux=True)
    logits = [f"policy.logits.{task}" for task in "abc"]
    for task, y in outputs.items():
        found = gradients(y.sin().sum(), model)
        assert [n for n in found if n.startswith("policy")] == [f"policy.logits.{task}"]
        assert (found[f"policy.logits.{task}"] != 0).all()
    assert list(gradients(aux["policy"], model)) == logits


def test_soft_one_hot_gradients_are_those_of_the_branch() -> None:
    model = build("ResNet")
    choices = all_take(model, "specific")
    found = gradients(model(images(), choices=choices)["a"].sin().sum(), model)
    for n, gradient in found.items():
        private = "specific.a" in n or n.startswith("heads.a") or "bn" in n or "shortcut_1" in n
        assert (gradient != 0).any() == private, n


# ---------------------------------------------------------------------- work and purity


@norms
def test_a_task_alone_runs_no_private_work_of_others(norm: str) -> None:
    model = build("ResNet", norm=norm)
    sets = model.parameter_task_sets()
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(images(), ["b"])
    assert called
    for name in called:
        own = [f"{name}.{rest}" for rest, _ in model.get_submodule(name).named_parameters()]
        assert not own or not name or any("b" in sets[parameter] for parameter in own), name


def test_one_batch_per_task() -> None:
    model = build("ResNet", norm="task").eval()
    perturb(model)
    batches = {task: images(n + 1, (16 + n, 20)) for n, task in enumerate("abc")}
    choices = drawn(model, 3)
    outputs = model(batches, choices=choices)
    for task, batch in batches.items():
        same(model(batch, [task], choices=choices), {task: outputs[task]})


def test_a_forward_pass_leaves_norm_statistics_alone_behind() -> None:
    model = build("ResNet")
    before = {n: (value, value.clone()) for n, value in model.state_dict().items()}
    kept = [dict(vars(module)) for module in model.modules()]
    model(images())
    assert [dict(vars(module)) for module in model.modules()] == kept
    for n, (value, old) in before.items():
        assert torch.equal(value, old) or "running" in n or "num_batches" in n, n


@pytest.mark.slow
def test_copies_state_and_pickles_compute_the_same() -> None:
    model = build("EfficientNet").eval()
    perturb(model)
    model.policy.tau.steps.fill_(700)
    expected = model(images())
    same(copy.deepcopy(model)(images()), expected)
    same(pickle.loads(pickle.dumps(model))(images()), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = build("EfficientNet").eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    same(other(images()), expected)
    assert other.policy.tau() == model.policy.tau()


@pytest.mark.slow
def test_compiles_whole() -> None:
    model = build("ResNet", "ab")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected, aux = copy.deepcopy(model)(images(), return_aux=True)
    torch.manual_seed(0)
    outputs, found = compiled(images(), return_aux=True)
    close(outputs, expected)
    close(found, aux)
    total = torch.stack([*(y.sum() for y in outputs.values()), *found.values()]).sum()
    total.backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.compiler.reset()


def test_norms_of_tasks_are_apart() -> None:
    model = build("ResNet", norm="task")
    kinds = [type(part) for part in model.network.children()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(PerTask) == kinds.count(Operator) == 10
