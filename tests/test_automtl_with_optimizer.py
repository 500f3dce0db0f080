"""AutoMTL under `MTLOptimizer`: what hard sharing, separate networks and parts of both become."""

import copy

import pytest
import torch
from models import assert_same, grads, lone_rows, wrapped
from torch import Tensor, nn

from arch_zoo import HPS, AutoMTL, MultiTaskModel
from gradbal import MTLOptimizer

Losses = dict[str, Tensor]
Choices = dict[str, Tensor]


def stage(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(stage(3, 4), stage(4, 4), stage(4, 6, 2)).double()


def heads(tasks: str = "abc") -> dict[str, nn.Module]:
    torch.manual_seed(1)
    made = [nn.Sequential(nn.Flatten(), nn.Linear(6 * 3 * 4, 2)).double() for _ in "abc"]
    return {task: made["abc".index(task)] for task in tasks}


def images(seed: int = 0) -> Tensor:
    return torch.randn(
        4, 3, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def supermodel() -> AutoMTL:
    torch.manual_seed(2)
    return AutoMTL(network(), heads(), images()).double()


def losses(model: MultiTaskModel, seed: int = 0) -> Losses:
    targets = {task: images(10 + n)[:, 0, 0, :2] for n, task in enumerate("abc")}
    return {t: (y - targets[t]).square().mean() for t, y in model(images(seed)).items()}


def choices(**rows: list[int]) -> Choices:
    return {task: torch.eye(3)[row] for task, row in rows.items()}


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


ALL_SHARED = choices(a=[0, 0, 0], b=[0, 0, 0], c=[0, 0, 0])
ALL_SPECIFIC = choices(a=[1, 1, 1], b=[1, 1, 1], c=[1, 1, 1])
PARTLY = choices(a=[0, 0, 0], b=[0, 2, 0], c=[0, 1, 1])


@pytest.mark.parametrize("rule", ["ew", "upgrad", "mgda", "pcgrad", "graddrop", "nash_mtl", "uw"])
def test_all_shared_steps_as_hard_sharing_does(rule: str) -> None:
    low, hps = supermodel().lower(ALL_SHARED), HPS(network(), heads())
    optimizers = [
        MTLOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), rule) for model in (low, hps)
    ]
    for seed in range(3):
        for model, optimizer in zip((low, hps), optimizers, strict=True):
            optimizer.step(losses(model, seed))
    torch.testing.assert_close(values(low), values(hps), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rule", ["upgrad", "mgda", "pcgrad", "cagrad", "graddrop"])
def test_all_specific_trains_as_separate_networks_do(rule: str) -> None:
    low = supermodel().lower(ALL_SPECIFIC)
    alone = {task: HPS(network(), heads(task)) for task in "abc"}
    optimizer = wrapped(low, rule, lr=0.1)
    plain = [torch.optim.SGD(model.parameters(), lr=0.1) for model in alone.values()]
    for seed in range(3):
        optimizer.step(losses(low, seed))
        for single, (task, model) in zip(plain, alone.items(), strict=True):
            single.zero_grad()
            losses(model, seed)[task].backward()
            single.step()
    for seed in range(3, 5):
        for task, model in alone.items():
            torch.testing.assert_close(losses(low, seed)[task], losses(model, seed)[task])


def test_a_step_finds_the_task_sets_of_a_lowered_model() -> None:
    low = supermodel().lower(PARTLY)
    assert {len(tasks) for tasks in low.parameter_task_sets().values()} == {1, 2, 3}
    optimizer = wrapped(low)
    optimizer.step(losses(low))
    names = [n for n, _ in low.named_parameters()]
    found = {
        names[number]: frozenset("abc"[k] for k in range(3) if bits >> k & 1)
        for number, bits in optimizer.core.sets.items()
    }
    assert found == low.parameter_task_sets()


def test_min_norm_does_not_stall_on_partly_shared_parameters() -> None:
    low = supermodel().lower(PARTLY)
    optimizer = wrapped(low, "mgda", lr=0.1)
    sets = low.parameter_task_sets()
    before = {n: p.detach().clone() for n, p in low.named_parameters()}
    first = torch.stack(list(losses(low).values())).sum()
    for _ in range(20):
        optimizer.step(losses(low))
    assert torch.stack(list(losses(low).values())).sum() < 0.9 * first
    some = [n for n, tasks in sets.items() if len(tasks) == 2]
    assert some
    assert all(not torch.equal(low.get_parameter(n), before[n]) for n in some)


@pytest.mark.parametrize("rule", ["ew", "upgrad"])
def test_the_regulariser_is_added_and_is_no_task(rule: str) -> None:
    model = supermodel()
    state = copy.deepcopy(model.state_dict())
    optimizer = wrapped(model, rule)

    def run(with_aux: bool) -> list[Tensor | None]:
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(3)
        outputs, aux = model(images(), return_aux=True)
        found = {task: y.square().mean() for task, y in outputs.items()}
        optimizer.backward(found, aux=aux if with_aux else None)
        return grads(model)

    extra = run(with_aux=True), run(with_aux=False)
    torch.manual_seed(3)
    _, aux = model(images(), return_aux=True)
    logits = {id(p) for p in model.architecture_parameters()}
    (rows,) = lone_rows([aux["policy"]], list(model.parameters()))
    wanted = [g if row is None else g + row for g, row in zip(extra[1], rows, strict=True)]
    assert_same(extra[0], wanted)
    assert {id(p) for p, row in zip(model.parameters(), rows, strict=True) if row is not None} == (
        logits
    )
    assert list(optimizer.core.names) == list(model.tasks)
