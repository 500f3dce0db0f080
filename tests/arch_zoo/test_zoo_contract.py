"""What every architecture promises, on every kind of input."""

import copy
import io
import pickle
from collections import Counter
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo_cases import CASES, SIZES, Kit, assert_sets, build

from arch_zoo import MTAN, MultiTaskModel
from arch_zoo.model import Inputs

VARIANT = {case: [pytest.mark.slow] * (" " in case) for case in CASES}  # of an architecture
EVERY = [pytest.param(case, kind, marks=VARIANT[case]) for case in CASES for kind in SIZES]
every = pytest.mark.parametrize(("case", "kind"), EVERY)
TURN = dict(zip(CASES, cycle(SIZES)))  # the kind of input that a case has on every push
in_turn = pytest.mark.parametrize(
    ("case", "kind"),
    [
        pytest.param(case, kind, marks=VARIANT[case] or [pytest.mark.slow] * (kind != TURN[case]))
        for case in CASES
        for kind in SIZES
    ],
)
each = pytest.mark.parametrize("case", [pytest.param(c, marks=VARIANT[c]) for c in CASES])


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=1e-6)


def calls(model: nn.Module, *args: Any, **kwargs: Any) -> Counter[str]:
    """Count the calls of all submodules, by name, in one forward pass."""
    counts: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in model.named_modules()
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return counts


def losses(model: MultiTaskModel, x: Inputs) -> dict[str, Tensor]:
    return {name: y.sin().sum() for name, y in model(x).items()}


@every
@pytest.mark.parametrize("size", [0, 1])
def test_sizes_and_batches_may_change(case: str, kind: str, size: int) -> None:
    model = build(case, kind).eval()
    for batch in (1, 3):
        outputs = model(Kit(kind).x(batch, size))
        shapes = {name: tuple(y.shape) for name, y in outputs.items()}
        assert shapes == {name: (batch, model.heads[name][1].out_features) for name in model.tasks}


@every
def test_task_sets_are_what_autograd_finds(case: str, kind: str) -> None:
    model = build(case, kind)
    assert_sets(model, losses(model, Kit(kind).x()))


@each
def test_parameters_are_shared_or_of_one_task(case: str) -> None:
    model = build(case, "vector")
    parts = [*model.shared_parameters()]
    for task in model.tasks:
        parts += model.task_parameters(task)
    assert Counter(map(id, parts)) == Counter(map(id, model.parameters()))
    assert {id(p) for p in model.architecture_parameters()} <= {id(p) for p in parts}


@every
def test_a_task_alone_runs_no_private_work_of_others(case: str, kind: str) -> None:
    model = build(case, kind).eval()
    sets, x = model.parameter_task_sets(), Kit(kind).x()
    expected = model(x)
    for task in model.tasks:
        equal(model(x, [task]), {task: expected[task]})
        for name in calls(model, x, [task]):
            own = [f"{name}.{rest}" for rest, _ in model.get_submodule(name).named_parameters()]
            assert not own or not name or any(task in sets[parameter] for parameter in own), name


@each
def test_order_of_tasks_is_the_callers(case: str) -> None:
    model = build(case, "vector").eval()
    x = Kit("vector").x()
    assert list(model(x, model.tasks[::-1])) == list(model.tasks[::-1])
    assert list(model(dict.fromkeys(model.tasks[::-1], x))) == list(model.tasks[::-1])
    assert model(x, []) == {}


@every
def test_one_batch_per_task(case: str, kind: str) -> None:
    model = build(case, kind).eval()
    x = Kit(kind).x()
    single = model(x)
    equal(model({task: x.clone() for task in model.tasks}), single)
    batches = {task: Kit(kind).x(n + 1, n) for n, task in enumerate(model.tasks)}
    outputs = model(batches)
    for task, batch in batches.items():
        equal(model(batch, [task]), {task: outputs[task]})
    equal(model(batches, model.tasks[-1:]), {model.tasks[-1]: outputs[model.tasks[-1]]})


@each
def test_one_batch_for_several_tasks_runs_once(case: str) -> None:
    model, x = build(case, "vector"), Kit("vector").x()
    assert calls(model, dict.fromkeys(model.tasks, x)) == calls(model, x)


def plain(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what modules hold besides parameters, buffers and submodules."""
    kept = ("_parameters", "_buffers", "_modules")
    return {
        name: {key: value for key, value in vars(module).items() if key not in kept}
        for name, module in model.named_modules()
    }


@in_turn
def test_forward_leaves_nothing_but_norm_statistics(case: str, kind: str) -> None:
    model = build(case, kind)
    names, before = plain(model), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        model(Kit(kind).x())
    assert plain(model) == names
    norms = tuple(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm1d))
    for name, value in model.state_dict().items():
        assert name.startswith(norms) or torch.equal(value, before[name]), name


@each
def test_two_forward_passes_before_one_backward(case: str) -> None:
    model = build(case, "image")
    first, second = losses(model, Kit("image").x()), losses(model, Kit("image").x(seed=1))
    total = torch.stack([*first.values(), *second.values()]).sum()
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@in_turn
def test_copies_compute_the_same(case: str, kind: str) -> None:
    model, x = build(case, kind).eval(), Kit(kind).x()
    expected = model(x)
    equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = build(case, kind, seed=1).eval()
    other.load_state_dict(state)
    equal(other(x), expected)


@each
def test_pickle_round_trip(case: str) -> None:
    model, x = build(case, "image").eval(), Kit("image").x()
    equal(pickle.loads(pickle.dumps(model))(x), model(x))


@each
def test_state_of_a_sized_model_loads_into_an_unsized_one(case: str) -> None:
    model, x = build(case, "vector").eval(), Kit("vector").x()
    torch.manual_seed(1)
    other = CASES[case](Kit("vector")).eval()
    other.load_state_dict(model.state_dict())
    equal(other(x), model(x))


@each
def test_an_optimizer_may_come_before_the_first_input(case: str) -> None:
    torch.manual_seed(0)
    model = CASES[case](Kit("tokens"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.stack(list(losses(model, Kit("tokens").x()).values())).sum().backward()
    optimizer.step()
    held = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert all(parameter.grad is not None for parameter in model.parameters())


@each
def test_initialize_again_changes_nothing(case: str) -> None:
    model = build(case, "image")
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.initialize(Kit("image").x(2, 1)) is model
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case != "HPS"))
        for case in CASES
        if case.isidentifier()
    ],
)
def test_compiles_whole(case: str) -> None:
    model, x = build(case, "vector"), Kit("vector").x()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs, aux = compiled(x, return_aux=True)
    equal(outputs, expected)
    sum(y.sum() for y in (*outputs.values(), *aux.values())).backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.compiler.reset()


@in_turn
def test_autocast(case: str, kind: str) -> None:
    model, x = build(case, kind).eval(), Kit(kind).x()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
    for name, y in outputs.items():
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected[name], rtol=0.1, atol=0.1)
    sum(y.float().sum() for y in outputs.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@in_turn
def test_cut_carries_the_gradients_of_all_below(case: str, kind: str) -> None:
    model, x = build(case, kind).double(), Kit(kind).x().double()
    feats = model.encode(x)
    shared = list(model.shared_parameters())
    for y in model.decode(feats).values() if feats.shared and shared else ():
        loss = y.sin().sum()
        direct = torch.autograd.grad(loss, shared, retain_graph=True)
        cotangents = torch.autograd.grad(loss, feats.shared, retain_graph=True, allow_unused=True)
        crossed = [(z, c) for z, c in zip(feats.shared, cotangents, strict=True) if c is not None]
        below = torch.autograd.grad(
            [z for z, _ in crossed], shared, [c for _, c in crossed], True, allow_unused=True
        )
        for parameter, left, right in zip(shared, below, direct, strict=True):
            if left is None:  # only refinements lie beyond a cut
                assert isinstance(model, MTAN)
                assert any(parameter is p for p in model.refine.parameters())
            else:
                torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@each
def test_loss_falls_and_every_parameter_moves(case: str) -> None:
    model, x = build(case, "vector"), Kit("vector").x(16)
    torch.manual_seed(0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = []
    for _ in range(15):
        optimizer.zero_grad()
        outputs, aux = model(x, return_aux=True)
        loss = torch.stack([(y - 1).square().mean() for y in outputs.values()]).sum()
        (loss + sum(aux.values())).backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert all(moved)
