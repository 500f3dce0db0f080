"""Rules that compare independent batches, through `aggregate` and through the optimizer."""

import re
from typing import Any

import pytest
import torch
from cases import J3, normal, rows
from torch import Tensor, nn

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.solvers import project_simplex


def close(ours: Tensor | None, theirs: Any, tol: float = 1e-6) -> None:
    assert ours is not None
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


def test_modo() -> None:
    rule, jacobian = make_rule("modo", gamma=0.01, rho=0.1), rows(J3)
    close(aggregate(jacobian, rule).weights, [0.382222, 0.365556, 0.252222])
    result = aggregate(jacobian, rule, more=[jacobian, jacobian + 0.5])
    close(result.weights, [0.387222, 0.365556, 0.247222])
    close(result.direction, [0.408889, 0.495, 0.86, 1.096111])
    close(aggregate(jacobian, rule, more=[jacobian + 0.5]).weights, result.weights)


def test_modo_settles_at_the_min_norm_point() -> None:
    jacobian, state = normal(4, 6, seed=3), None
    rule = make_rule("modo", gamma=0.02, rho=0.0)
    for _ in range(2000):
        result = aggregate(jacobian, rule, state=state)
        state = result.state
    close(result.weights, aggregate(jacobian, "mgda").weights)


def test_sdmgrad_exactly_and_as_the_authors_descend() -> None:
    jacobian = rows(J3)
    close(aggregate(jacobian, "sdmgrad").direction, [0.821577, 0.655602, 0.630705, 0.522822])
    close(
        aggregate(jacobian, "sdmgrad").state["tensors"]["weights"], [0.612033, 0.256017, 0.131950]
    )
    result = aggregate(jacobian, make_rule("sdmgrad", lr=5.0))
    close(result.direction, [0.969319, 1.199941, 0.446124, -0.169260])
    state = aggregate(jacobian, make_rule("sdmgrad", lr=10.0)).state
    close(state["tensors"]["weights"], [0.230128, 0.769872, 0])


@pytest.mark.parametrize("seed", range(5))
def test_sdmgrad_between_mgda_and_the_target(seed: int) -> None:
    jacobian, target = normal(4, 5, seed=seed), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    rule = make_rule("sdmgrad", lam=0.0)
    close(aggregate(jacobian, rule).direction, aggregate(jacobian, "mgda").direction)
    rule = make_rule("sdmgrad", lam=1e6, preferences=(1.0, 2.0, 3.0, 4.0))
    close(aggregate(jacobian, rule).direction, target @ jacobian, 1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_sdmgrad_solves_its_problem(seed: int) -> None:
    """No task moves down the objective along the simplex."""
    jacobian, lam = normal(6, 8, seed=seed), 0.3
    result = aggregate(jacobian, make_rule("sdmgrad", lam=lam))
    inner, total = result.state["tensors"]["weights"], result.weights
    assert total is not None
    slopes = jacobian @ jacobian.T @ total
    assert (slopes >= inner @ slopes - 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_sdmgrad_descends_to_the_exact_point(seed: int) -> None:
    jacobian, state = normal(4, 8, seed=seed), None
    for _ in range(200):
        result = aggregate(jacobian, "sdmgrad", more=[jacobian], state=state)
        state = result.state
    close(result.direction, aggregate(jacobian, "sdmgrad").direction, 1e-5)


@pytest.mark.parametrize("lr", [None, 2.0])
@pytest.mark.parametrize("count", [2, 3])
def test_sdmgrad_descends_alike_in_any_unit(count: int, lr: float | None) -> None:
    rule = make_rule("sdmgrad", lr=lr, n_iter=3)
    batches = [normal(4, 6, seed=seed) for seed in range(count)]
    plain = aggregate(batches[0], rule, more=batches[1:]).weights
    assert plain is not None
    assert (plain - 1 / 4).abs().max() > 0.01
    for size in (1e-3, 1e3):
        scaled = [size * batch for batch in batches]
        close(aggregate(scaled[0], rule, more=scaled[1:]).weights, plain, 1e-12)


@pytest.mark.parametrize(("count", "lr"), [(1, 2.0), (2, None), (2, 2.0), (3, None)])
def test_sdmgrad_stays_where_it_is_without_gradients(count: int, lr: float | None) -> None:
    rule, nothing = make_rule("sdmgrad", lr=lr, lam=0.0), torch.zeros(3, 4, dtype=torch.float64)
    batches = [normal(3, 4, seed=seed) for seed in range(count)]
    before = aggregate(batches[0], make_rule("sdmgrad", lr=2.0, lam=0.0), more=batches[1:])
    after = aggregate(nothing, rule, more=[nothing] * (count - 1), state=before.state)
    close(after.weights, before.weights, 1e-12)


@pytest.mark.parametrize("m", [1, 2, 5, 40])
def test_both_projections_are_one(m: int) -> None:
    for seed in range(20):
        point = normal(m, seed=seed) * 10 ** (seed % 5 - 2)
        close(project_simplex(point), project_simplex(point, capturable=True), 1e-12)


# ---------------------------------------------------------------------------- the optimizer


class Net(nn.Module):
    """A trunk and two heads in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(4, 3).double()
        self.heads = nn.ModuleList(nn.Linear(3, 1).double() for _ in range(2))

    def losses(self, seed: int) -> list[Tensor]:
        inputs = normal(8, 4, seed=seed)
        features = torch.tanh(self.trunk(inputs))
        return [
            (head(features) - inputs[:, :1] * (k + 1)).square().mean()
            for k, head in enumerate(self.heads)
        ]

    def rows(self, seed: int) -> Tensor:
        params = list(self.trunk.parameters())
        grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in self.losses(seed)]
        return torch.stack([torch.cat([grad.flatten() for grad in row]) for row in grads])


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_batches_meet_in_the_optimizer(name: str, count: int, engine: str) -> None:
    net = Net()
    mtl_opt = MTLOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), name, engine=engine, scale="native"
    )
    state = None
    for step in range(3):
        seeds = [10 * step + k for k in range(count)]
        jacobians = [net.rows(seed) for seed in seeds]
        expected = aggregate(jacobians[0], name, more=jacobians[1:], state=state)
        state = expected.state
        plain = torch.autograd.grad(net.losses(seeds[0])[1], net.heads[1].weight)[0]
        later = [(lambda s=seed: net.losses(s)) for seed in seeds[2:]]  # a closure will do, too
        mtl_opt.step(*[net.losses(seed) for seed in seeds[:2]], *later)
        found = torch.cat([param.grad.flatten() for param in net.trunk.parameters()])
        close(found, expected.direction, 1e-9)
        close(net.heads[1].weight.grad, plain, 1e-12)
        assert mtl_opt.last is not None
        assert mtl_opt.last.grams["model"].shape == (2, 2)


def test_batches_may_come_from_one_forward_pass() -> None:
    net = Net()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "modo", scale="native")
    inputs = normal(8, 4)
    features = torch.tanh(net.trunk(inputs))
    halves = [
        [head(features[half]).square().mean() for head in net.heads]
        for half in (slice(0, 4), slice(4, 8))
    ]
    mtl_opt.backward(*halves)
    assert net.trunk.weight.grad.isfinite().all()


def test_other_tasks_in_another_batch() -> None:
    net = Net()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "modo")
    a, b = net.losses(0)
    sentence = (
        "MTLOptimizer: every batch must have losses of the same tasks, got those of ['b'] beside "
        "['a', 'b']; leave the task out everywhere."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        mtl_opt.step({"a": a, "b": b}, {"b": net.losses(1)[1]})
    sentence = "MTLOptimizer: several batches cannot be accumulated in pieces; pass them whole."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        mtl_opt.backward(net.losses(0), net.losses(1), accumulate=True)


def test_batches_at_a_representation() -> None:
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    mtl_opt = MTLOptimizer(base, "modo", engine="representation")
    mtl_opt.step(net.losses(0))
    sentence = (
        "Representation: gradients at the inputs of different batches share no space, so they "
        "cannot be compared; choose another engine, such as Sequential."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        mtl_opt.step(net.losses(0), net.losses(1))


def test_batches_in_groups() -> None:
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    mtl_opt = MTLOptimizer(base, "modo", groups="tensor", scale="native", engine="factored")
    sizes = [param.numel() for param in net.trunk.parameters()]
    parts = [net.rows(seed).split(sizes, dim=1) for seed in (0, 1)]
    mtl_opt.backward(net.losses(0), net.losses(1))
    for param, one, two in zip(net.trunk.parameters(), *parts, strict=True):
        close(param.grad.flatten(), aggregate(one, "modo", more=[two]).direction, 1e-9)


def test_one_batch_is_said_to_be_biased(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "modo")
    for seed in range(3):
        mtl_opt.step(net.losses(seed))
    said = [record.message for record in caplog.records]
    assert said == [
        "MoDo can compare independent batches and got one, which biases its weights; pass their "
        "losses as `step(losses, second)` or `step(losses, second, third)`."
    ]
