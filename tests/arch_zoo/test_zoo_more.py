"""What the architectures of recommender, dense and adapter work promise alike."""

import io
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from more_cases import MORE, make
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from arch_zoo import MultiTaskModel, PerTask, task_losses

QUICK = ("ESMM", "PEPNet", "STEM", "sluice", "LoRA", "PADNet")
each = pytest.mark.parametrize("name", MORE)
some = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in MORE]
)


def loss(y: Tensor, target: object) -> Tensor:
    return y.sin().sum()


def losses(model: MultiTaskModel, x: Any, **named: Any) -> dict[str, Tensor]:
    """Return a loss per task, those of auxiliary predictions included."""
    torch.manual_seed(1)
    tasks = model.tasks
    return task_losses(model.run(x, **named), dict.fromkeys(tasks, loss), dict.fromkeys(tasks, 0))


def measured(model: MultiTaskModel, found: dict[str, Tensor]) -> dict[str, frozenset[str]]:
    """Return the tasks whose losses reach each parameter, as autograd finds them."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    sets: dict[str, set[str]] = {name: set() for name in names}
    for task, value in found.items():
        gradients = torch.autograd.grad(
            value, [model.get_parameter(n) for n in names], allow_unused=True, retain_graph=True
        )
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                sets[name].add(task)
    return {name: frozenset(tasks) for name, tasks in sets.items()}


@each
def test_task_sets_are_what_autograd_finds(name: str) -> None:
    model, x, named = make(name)
    found = losses(model, x, **named)
    if name == "ESCM2":  # the loss of its third task reads the imputation, too
        result = model.run(x)
        found["cvr"] = (result.outputs["cvr"] * result.outputs["imputation"]).sum()
    sets = model.parameter_task_sets()
    trained = {n: sets[n] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == measured(model, found)


@each
def test_a_task_alone_gets_what_it_gets_among_others(name: str) -> None:
    model, x, named = make(name)
    model.eval()
    sets, expected = model.parameter_task_sets(), model(x, **named)
    seen: Counter[str] = Counter()
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *_, path=path: seen.update([path]))
    for task in model.tasks:
        seen.clear()
        alone = model(x, [task], **named)
        torch.testing.assert_close(alone[task], expected[task])
        for path in seen if not MORE[name].reads_others else ():
            own = [f"{path}.{n}" for n, _ in model.get_submodule(path).named_parameters()]
            assert not own or not path or any(task in sets[n] for n in own), path


@each
def test_one_batch_per_task(name: str) -> None:
    model, _, _ = make(name)
    model.eval()
    case = MORE[name]
    batches = {task: case.x(n + 2, n) for n, task in enumerate(model.tasks)}
    given = {task: case.named(n + 2, n) for n, task in enumerate(model.tasks)}
    outputs = model(PerTask(batches), **PerTask.named(**given))
    for task in model.tasks:
        alone = model(batches[task], [task], **given[task])
        torch.testing.assert_close(outputs[task], alone[task])


@some
def test_copies_compute_the_same(name: str) -> None:
    model, x, named = make(name)
    expected = model.eval()(x, **named)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x, **named), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = make(name, seed=1)[0].eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x, **named), expected)


@some
def test_forward_leaves_nothing_but_norm_statistics(name: str) -> None:
    model, x, named = make(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    first, second = losses(model, x, **named), losses(model, x, **named)
    torch.stack([*first.values(), *second.values()]).sum().backward()
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    norms = tuple(n for n, m in model.named_modules() if isinstance(m, _BatchNorm))
    for key, value in model.state_dict().items():
        assert key.startswith(norms) or torch.equal(value, before[key]), key


@some
def test_loss_falls_and_what_is_frozen_stays(name: str) -> None:
    model, x, named = make(name)
    torch.manual_seed(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("up.weight"):  # of low-rank updates, whose other factor waits for it
                parameter += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01)
    history = []
    for _ in range(25):
        optimizer.zero_grad()
        result = model.run(x, **named)
        total = sum(
            (y - 1).square().mean()
            for y in [
                *(result.outputs[task] for task in model.tasks),
                *(prediction.value for prediction in result.predictions.values()),
            ]
        )
        (total + sum(result.aux.values())).backward()
        optimizer.step()
        history.append(total.item())
    assert history[-1] < 0.8 * history[0]
    for path, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[path])


@pytest.mark.slow
@each
def test_exports_with_any_number_of_examples(name: str) -> None:
    model, x, named = make(name)
    model.eval()
    exported = torch.export.export(model, (x,), named, dynamic_shapes=_shapes(x, named))
    case = MORE[name]
    other, given = case.x(7, 1), case.named(7, 1)
    module = exported.module(check_guards=not named)  # whose checks know no keywords
    torch.testing.assert_close(module(other, **given), model(other, **given))


def _shapes(x: Any, named: dict[str, Any]) -> dict[str, Any]:
    dynamic = pytree.tree_map(lambda _: {0: torch.export.Dim.DYNAMIC}, (x, named))
    return {"x": dynamic[0], **({"named": dynamic[1]} if named else {})}
