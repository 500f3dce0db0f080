"""A captured step that is replayed with new data equals as many eager steps."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from models import data, fill
from replay import capture
from torch import Tensor, nn

from gradbal import MTLOptimizer, rule_names

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PROBING = ("auto_lambda", "forum", "moml")  # look at the losses at other parameters
RULES = [name for name in rule_names() if name not in PROBING]
WARM, REPLAYED = 3, 4


class Net(nn.Module):
    """A trunk and heads; losses above 0."""

    def __init__(self, n_tasks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(n_tasks))
        fill(self).to(DEVICE, dtype)

    def losses(self, x: Tensor) -> list[Tensor]:
        z = self.trunk(x).tanh()
        return [(h(z) - k).square().mean() * (k + 1) + 0.1 for k, h in enumerate(self.heads)]


def batches(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [data(6, 4, seed=seed).to(DEVICE, dtype) for seed in range(count)]


def make(rule: str, m: int, dtype: torch.dtype, **options: Any) -> tuple[Net, MTLOptimizer]:
    net = Net(m, dtype)
    base = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return net, MTLOptimizer(base, rule, capturable=True, **{"engine": "sequential", **options})


def trained(
    rule: str, m: int, dtype: torch.dtype, *, replayed: bool, epochs: bool, **options: Any
) -> tuple[Net, MTLOptimizer]:
    """Take warm-up steps and then as many eager or replayed ones, marking epochs in between."""
    net, optimizer = make(rule, m, dtype, **options)
    xs = batches(WARM + REPLAYED, dtype)
    for x in xs[:WARM]:
        optimizer.step(net.losses(x))
    here = xs[WARM].clone()
    again = capture(optimizer, lambda: optimizer.step(net.losses(here))) if replayed else None
    for x in xs[WARM:]:
        here.copy_(x)
        if again is None:
            optimizer.step(net.losses(x))
        else:
            again()
        if epochs:
            optimizer.end_epoch()
    return net, optimizer


def assert_alike(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, Mapping):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_alike(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, tuple):
        assert len(a) == len(b), path
        for one, other in zip(a, b, strict=True):
            assert_alike(one, other, path)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, equal_nan=True, msg=path)
    else:
        assert a == b, path


def check(rule: str, m: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    nets, optimizers = zip(
        *(trained(rule, m, dtype, replayed=flag, **options) for flag in (False, True)), strict=True
    )
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    states = [optimizer.core.state_dict() for optimizer in optimizers]
    assert_alike(*({k: v for k, v in state.items() if k != "choice"} for state in states))


@pytest.mark.parametrize("rule", RULES)
def test_a_replay_equals_eager_steps(rule: str) -> None:
    check(rule, epochs=True)


@pytest.mark.parametrize("rule", ["upgrad", "uw", "famo", "gradvac", "pcgrad", "nash_mtl"])
@pytest.mark.parametrize("update_every", [2, 3])
def test_weights_that_are_held_are_held_in_a_replay(rule: str, update_every: int) -> None:
    check(rule, epochs=False, update_every=update_every)


@pytest.mark.parametrize("engine", ["factored", "streaming", "batched"])
@pytest.mark.parametrize("rule", ["upgrad", "cr_mogm"])
def test_engines_can_be_replayed(rule: str, engine: str) -> None:
    check(rule, epochs=False, engine=engine)


@pytest.mark.parametrize("rule", ["upgrad", "moco", "graddrop"])
def test_groups_can_be_replayed(rule: str) -> None:
    check(rule, epochs=False, groups="tensor")


@pytest.mark.parametrize("rule", ["uw", "moco", "famo", "gradnorm", "m_config"])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(rule: str) -> None:
    net, optimizer = make(rule, 3, torch.float64)
    xs = batches(3, torch.float64)
    for x in xs:
        optimizer.step(net.losses(x))
    before = optimizer.core.state_dict()["state"][0]["groups"]
    params = [param.detach().clone() for param in net.parameters()]
    losses = net.losses(xs[0])
    losses[1] = losses[1] * torch.inf
    optimizer.step(losses)
    with torch.no_grad():
        for param, old in zip(net.parameters(), params, strict=True):
            param.copy_(old)
    after = optimizer.core.state_dict()["state"][0]["groups"]
    assert_alike(before, after)


def test_a_task_that_is_absent_in_the_capture_keeps_its_state() -> None:
    net, optimizer = make("uw", 3, torch.float64)
    xs = batches(WARM + 1, torch.float64)
    names = ("a", "b", "c")

    def losses(x: Tensor, skip: bool) -> dict[str, Tensor]:
        found = dict(zip(names, net.losses(x), strict=True))
        return {k: v for k, v in found.items() if not (skip and k == "b")}

    for i, x in enumerate(xs):
        optimizer.step(losses(x, skip=i > 0))
    before = optimizer.core.state["model"]["log_variance"].clone()
    here = xs[0].clone()
    again = capture(optimizer, lambda: optimizer.step(losses(here, skip=True)))
    again()
    after = optimizer.core.state["model"]["log_variance"]
    assert after[1] == before[1]
    assert (after[[0, 2]] != before[[0, 2]]).all()


def test_a_new_task_after_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net, optimizer = make("uw", 3, torch.float64)
    x = batches(1, torch.float64)[0]
    named = dict(zip("abc", net.losses(x), strict=True))
    optimizer.step({k: v for k, v in named.items() if k != "c"})
    monkeypatch.setattr("gradbal.step.state._capturing", lambda: True)
    optimizer.step(dict(zip("ab", net.losses(x)[:2], strict=True)))
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="'c' is new, and a captured graph has no room"):
        optimizer.step(dict(zip("abc", net.losses(x), strict=True)))
