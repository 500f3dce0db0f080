"""STCH is the gradient of its objective, from nadirs that are averages over epochs."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import losses_for, seeded
from torch import Tensor

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.step.weighting import MODEL


def weights_for(losses: Tensor, **options: Any) -> Tensor:
    result = aggregate(torch.eye(len(losses)).double(), make_rule("stch", **options), losses=losses)
    assert result.weights is not None
    return result.weights


@pytest.mark.parametrize("mu", [0.03, 0.5, 1.0, 40.0])
@pytest.mark.parametrize("m", [1, 2, 3, 17])
def test_weights_are_the_gradient_of_the_objective(m: int, mu: float) -> None:
    nadir, losses = losses_for(m, seed=1), losses_for(m).requires_grad_()
    value = m * mu * torch.logsumexp((losses / nadir).log() / mu, dim=0)
    (expected,) = torch.autograd.grad(value, losses)
    found = weights_for(losses.detach(), mu=mu, nadir=tuple(nadir.tolist()))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_value_of_the_sheet() -> None:
    excess = (torch.tensor([0.5, 2.0, 1.0]) / torch.tensor([1.0, 2.0, 4.0])).log()
    value = 3 * torch.logsumexp(excess - excess.max(), dim=0)
    assert abs(value - 1.678847) < 1e-6


def test_between_the_worst_task_and_all_alike() -> None:
    losses, nadir = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), (1.0, 2.1, 4.0)
    worst = torch.tensor([0.0, 1.5, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights_for(losses, mu=1e-3, nadir=nadir), worst)
    even = weights_for(losses, mu=1e9, nadir=nadir)
    torch.testing.assert_close(even, 1 / losses, rtol=1e-8, atol=0)


# ---------------------------------------------------------------------------- measured nadirs


class Slow:
    """What each task has seen, in lists."""

    def __init__(self, warmup: int, mu: float) -> None:
        self.warmup, self.mu, self.epoch = warmup, mu, 0
        self.seen: dict[str, dict[int, list[float]]] = {}

    def nadir(self, task: str) -> float | None:
        epochs = [e for e in self.seen.get(task, {}) if self.warmup <= e < self.epoch]
        return sum(self.seen[task][epochs[0]]) / len(self.seen[task][epochs[0]]) if epochs else None

    def step(self, losses: Mapping[str, float]) -> list[float]:
        variables = {task: torch.tensor(loss, dtype=torch.float64) for task, loss in losses.items()}
        for variable in variables.values():
            variable.requires_grad_()
        nadirs = {task: self.nadir(task) for task in losses}
        known = [(variables[task] / n).log() for task, n in nadirs.items() if n is not None]
        value = sum(variables[task].log() for task, n in nadirs.items() if n is None)
        if known:
            value = value + len(known) * self.mu * torch.logsumexp(
                torch.stack(known) / self.mu, dim=0
            )
        value.backward()
        for task, loss in losses.items():
            self.seen.setdefault(task, {}).setdefault(self.epoch, []).append(loss)
        return [variable.grad.item() for variable in variables.values()]


def optimizer(rule: str, **options: Any) -> tuple[MTLOptimizer, Tensor]:
    parameter = torch.nn.Parameter(torch.ones(()).double())
    rule_object = make_rule(rule, **options)
    return MTLOptimizer(torch.optim.SGD([parameter], lr=0), rule_object), parameter


def applied(mtl_opt: MTLOptimizer, parameter: Tensor, losses: Mapping[str, float]) -> Tensor:
    mtl_opt.step({task: loss * parameter for task, loss in losses.items()})
    assert mtl_opt.last is not None
    assert mtl_opt.last.weights is not None
    return mtl_opt.last.weights


@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_tasks_that_come_and_go_are_measured_one_by_one(seed: int, warmup: int) -> None:
    generator, names = seeded(seed), "abcd"
    mtl_opt, parameter = optimizer("stch", warmup=warmup, mu=0.5)  # c and d are new later
    slow = Slow(warmup, 0.5)
    for epoch in range(6):
        for _ in range(3):
            here = torch.rand(4, generator=generator) < 0.4
            here[epoch % 4] = True
            drawn = (0.1 + torch.rand(4, generator=generator)).tolist()
            losses = {n: x for n, x, is_here in zip(names, drawn, here, strict=True) if is_here}
            expected = torch.tensor(slow.step(losses), dtype=torch.float64)
            found = applied(mtl_opt, parameter, losses)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        mtl_opt.end_epoch()
        slow.epoch += 1
    assert any(slow.nadir(name) for name in names)


def test_windows_are_epochs_of_so_many_steps() -> None:
    marked, p = optimizer("stch", warmup=1)
    counted, q = optimizer("stch", warmup=1, window=3)
    for step in range(12):
        losses = dict(zip("ab", losses_for(2, seed=step).tolist(), strict=True))
        assert torch.equal(applied(marked, p, losses), applied(counted, q, losses))
        if step % 3 == 2:
            marked.end_epoch()
    nadir = torch.stack([losses_for(2, seed=step) for step in (3, 4, 5)]).mean(dim=0)
    for mtl_opt in (marked, counted):
        torch.testing.assert_close(mtl_opt.core.state[MODEL]["nadir"], nadir)


@pytest.mark.parametrize(
    ("rule", "options"),
    [("stch", {"warmup": 1, "window": 2}), ("igb", {"window": 2}), ("si", {})],
)
def test_no_unit_matters(rule: str, options: dict[str, Any]) -> None:
    factors = torch.tensor([1e-12, 1.0, 3e20], dtype=torch.float64)
    jacobian, states = torch.eye(3).double(), [None, None]
    for step in range(9):
        losses = losses_for(3, seed=step)
        found = []
        for i, scaled in enumerate((losses, factors * losses)):
            result = aggregate(jacobian, make_rule(rule, **options), losses=scaled, state=states[i])
            states[i] = result.state
            found.append(result.weights * scaled)
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
