"""What lowered models of AutoMTL run, and what is done with them."""

import copy
import io
import pickle

import pytest
import torch
from automtl_cases import SOME, all_take, build, calls, drawn, images, perturb, same
from torch import Tensor, nn

from arch_zoo.automtl import Lowered, recalibrate

each = pytest.mark.parametrize("name", SOME)
norms = pytest.mark.parametrize("norm", ["shared", "task"])
draws = pytest.mark.parametrize("seed", [3, 8])


# ---------------------------------------------------------------------- work


@norms
@draws
def test_a_task_alone_runs_no_private_work_of_others(norm: str, seed: int) -> None:
    model = build("ResNet", norm=norm)
    low = model.lower(drawn(model, seed)).eval()
    sets = low.parameter_task_sets()
    whole = low(images())
    for tasks in (["a"], ["b"], ["c", "a"]):
        counts = calls(low, images(), tasks)
        for name in counts:
            own = [f"{name}.{rest}" for rest, _ in low.get_submodule(name).named_parameters()]
            assert not own or any(sets[parameter] & set(tasks) for parameter in own), name
        same(low(images(), tasks), {task: whole[task] for task in tasks})
    assert calls(low, images(), ["a"]).total() < calls(low, images()).total()
    assert low(images(), []) == {}


def test_one_batch_per_task() -> None:
    model = build("MobileNetV2").eval()
    perturb(model)
    low = model.lower(drawn(model, 3))
    batches = {task: images(n + 1, (16 + n, 20)) for n, task in enumerate("abc")}
    outputs = low(batches)
    for task, batch in batches.items():
        torch.testing.assert_close(low(batch)[task], outputs[task])


def test_some_tasks_update_the_statistics_once() -> None:
    model = build("ResNet")
    low = model.lower(all_take(model, "shared"))
    low(images(), ["a", "c"])
    assert low.network.bn1.shared.num_batches_tracked == 1


# ---------------------------------------------------------------------- tools


def ready(name: str = "EfficientNet") -> Lowered:
    model = build(name).eval()
    perturb(model)
    return model.lower(drawn(model, 3))


@pytest.mark.slow
def test_copies_state_and_pickles_compute_the_same() -> None:
    low = ready()
    expected = low(images())
    pickled = pickle.loads(pickle.dumps(low))
    for copied in (copy.deepcopy(low), pickled, copy.deepcopy(pickled)):
        same(copied(images()), expected)
        same(copied(images(), ["b", "a"]), {task: expected[task] for task in "ba"})
    file = io.BytesIO()
    torch.save(low.state_dict(), file)
    file.seek(0)
    model = build("EfficientNet").eval()
    other = model.lower(drawn(model, 3))
    other.load_state_dict(torch.load(file, weights_only=True))
    same(other(images()), expected)


@pytest.mark.slow
@each
def test_compiles_whole(name: str) -> None:
    low = ready(name).train()
    compiled = torch.compile(copy.deepcopy(low), fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(images()), low(images())
    torch.testing.assert_close(outputs, expected)
    torch.stack([y.sum() for y in outputs.values()]).sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())
    some = compiled(images(), ["b"])
    torch.testing.assert_close(some, {"b": low(images(), ["b"])["b"]})
    torch.compiler.reset()


@pytest.mark.slow
def test_exports() -> None:
    low = ready()
    exported = torch.export.export(low, (images(),)).module()
    torch.testing.assert_close(exported(images()), low(images()))


def test_code_reads_well() -> None:
    model = build("ResNet", ["seg", "depth"])
    choices = all_take(model, "shared")
    choices["depth"][-1] = torch.tensor([0.0, 1.0, 0.0])
    code = model.lower(choices).network.code
    for line in (
        "layer1_0_conv1_shared = self.layer1_0_conv1.shared(maxpool)",
        "layer2_1_conv2_specific_depth = self.layer2_1_conv2.specific.depth(layer2_1_relu)",
        "add_3_seg = layer2_1_bn2_specific_seg + layer2_0_relu_1",
        "return {'seg': layer2_1_relu_1_seg, 'depth': layer2_1_relu_1_depth}",
    ):
        assert line in code


# ---------------------------------------------------------------------- recalibration


def test_recalibrated_statistics_are_means_over_batches() -> None:
    model = build("ResNet")
    perturb(model)
    low = model.lower(drawn(model, 3)).eval()
    low.network.bn1.train()
    modes = [module.training for module in low.modules()]
    batches = [images(4, seed=seed) for seed in range(3)]
    seen: dict[str, list[Tensor]] = {}
    bns = {n: m for n, m in low.named_modules() if isinstance(m, nn.BatchNorm2d)}
    trained = copy.deepcopy(low).train()
    for name, bn in trained.named_modules():
        if name in bns:
            bn.register_forward_hook(
                lambda module, args, _, name=name: seen.setdefault(name, []).append(args[0])
            )
    for batch in batches:
        trained(batch)
    recalibrate(low, batches)
    assert [module.training for module in low.modules()] == modes
    assert {bn.momentum for bn in bns.values()} == {0.1}
    for name, bn in bns.items():
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen[name]]).mean(dim=0)
        var = torch.stack([x.var((0, 2, 3)) for x in seen[name]]).mean(dim=0)
        torch.testing.assert_close(bn.running_mean, mean)
        torch.testing.assert_close(bn.running_var, var)


def test_recalibration_leaves_dropout_off_and_survives_an_error() -> None:
    network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)).train()
    recalibrate(network, [torch.ones(8, 2), 3 * torch.ones(8, 2)])
    assert network[1].running_mean.tolist() == [2.0, 2.0]
    assert all(module.training for module in network.modules())

    def failing() -> object:
        yield torch.ones(8, 2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match=r"^no more$"):
        recalibrate(network, failing())
    assert network[1].momentum == 0.1
    assert all(module.training for module in network.modules())
