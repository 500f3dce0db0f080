"""Rules that look ahead: on quadratics with known derivatives, and on a small network."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import normal, rows
from torch import Tensor, nn

from gradbal import MTLOptimizer, aggregate, make_rule
from gradbal.solvers import simplex_qp
from gradbal.step.weighting import MODEL

START = torch.tensor([0.5, 0.5], dtype=torch.float64)
TRAIN, VALID = rows([[1, 0], [0, 2]]), rows([[1.5, 0], [0, 1]])


def bowls(centres: Tensor, start: Tensor = START) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Losses and gradients of half the squared distances to some centres."""

    def at(shift: Tensor) -> tuple[Tensor, Tensor]:
        gaps = start + shift - centres
        return gaps.square().sum(dim=1) / 2, gaps

    return at


def first_step(name: str, more: Any, **options: Any) -> Any:
    losses, jacobian = bowls(TRAIN)(torch.zeros(2))
    return aggregate(jacobian, make_rule(name, **options), losses=losses, more=more)


def close(ours: Tensor, theirs: Any, tol: float = 1e-6) -> None:
    theirs = torch.as_tensor(theirs, dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, rtol=tol, atol=tol)


# ---------------------------------------------------------------------------- the quadratic


def test_auto_lambda_slope() -> None:
    """Adam's first moment after one step holds a tenth of the slope."""
    result = first_step("auto_lambda", [bowls(VALID)], inner_lr=0.1)
    close(10 * result.state["tensors"]["weights.mean"], [-0.026, 0.028])
    close(result.weights, [0.1 + 1e-4, 0.1 - 1e-4], 1e-8)


def test_auto_lambda_slope_of_one_primary_task() -> None:
    result = first_step("auto_lambda", [bowls(VALID)], inner_lr=0.1, primary=(1.0, 0.0))
    _, ahead = bowls(VALID)(-0.1 * (0.1 * bowls(TRAIN)(torch.zeros(2))[1]).sum(dim=0))
    _, jacobian = bowls(TRAIN)(torch.zeros(2))
    close(10 * result.state["tensors"]["weights.mean"], -0.1 * jacobian @ ahead[0])


def test_auto_lambda_takes_its_slope_from_a_batch_of_its_own() -> None:
    _, other = bowls(TRAIN + 1)(torch.zeros(2))
    result = first_step("auto_lambda", [other, bowls(VALID)], inner_lr=0.1)
    _, ahead = bowls(VALID)(-0.1 * (0.1 * other).sum(dim=0))
    close(10 * result.state["tensors"]["weights.mean"], -0.1 * other @ ahead.sum(dim=0))


def test_moml_with_two_tasks_that_pull_apart_stands_still() -> None:
    result = first_step("moml", [bowls(VALID)], inner_lr=0.1)
    close(result.state["tensors"]["logits"], [0.0, 0.0])
    close(result.weights, [0.5, 0.5])


def test_moml_slopes_are_those_of_autograd() -> None:
    """Each task's row is the derivative of its loss a step ahead by the logits."""
    jacobian, upper = normal(3, 4, seed=1), normal(3, 4, seed=2)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    ahead = -0.1 * torch.softmax(logits, dim=0) @ jacobian
    found = [torch.autograd.grad(u @ ahead, logits, retain_graph=True)[0] for u in upper]
    expected = aggregate(torch.stack(found), "mgda").direction
    rule = make_rule("moml", inner_lr=0.1, normalize="none")
    result = aggregate(jacobian, rule, more=[lambda shift: (torch.ones(3), upper)])
    close(10 * result.state["tensors"]["logits.mean"], expected)


def test_forum_direction() -> None:
    result = first_step("forum", [bowls(TRAIN), bowls(VALID)])
    close(result.direction, [-0.093660, -0.129947])
    close(result.stats["weight"], [0.5, 0.5])


def test_forum_takes_validation_gradients_as_they_are() -> None:
    _, upper = bowls(VALID)(torch.zeros(2))
    ours, theirs = (first_step("forum", [bowls(TRAIN), val]) for val in (upper, bowls(VALID)))
    close(ours.direction, theirs.direction, 1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_forum_lowers_its_constraint(seed: int) -> None:
    """The direction on parameters and logits agrees with the gradient of q as much as it must."""
    centres, start = 3 * normal(3, 5, seed=seed), normal(5, seed=seed + 50)
    upper = bowls(3 * normal(3, 5, seed=seed + 100), start)
    losses, jacobian = bowls(centres, start)(torch.zeros(5))
    shift = torch.zeros(5, dtype=torch.float64)
    for _ in range(5):
        shift = shift - 0.1 * bowls(centres, start)(shift)[1].mean(dim=0)
    fall = losses - bowls(centres, start)(shift)[0]
    on_logits, slope = (fall - fall.mean()) / 3, jacobian.mean(dim=0)
    square = on_logits @ on_logits + slope @ slope
    result = aggregate(jacobian, "forum", losses=losses, more=[bowls(centres, start), upper])
    force = 10 * result.state["tensors"]["logits.mean"] @ on_logits / (on_logits @ on_logits)
    along = result.direction @ slope + force * (on_logits @ on_logits)
    assert along >= 0.1 * square * (1 - 1e-6)
    assert result.stats["residual"] <= 1e-8


# ---------------------------------------------------------------------------- a network


class Net(nn.Module):
    """A trunk with dropout and batch statistics, and a head per task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1))
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def losses(self, seed: int) -> list[Tensor]:
        inputs = normal(16, 4, seed=seed).float()
        targets = [inputs[:, :1], inputs[:, 1:2] * inputs[:, 2:3]]
        features = self.trunk(inputs)
        pairs = zip(self.heads, targets, strict=True)
        return [(head(features) - target).square().mean() for head, target in pairs]


def batches(net: Net, rule: str, step: int) -> list[Any]:
    """What `step` is called with."""
    train, valid = (lambda: net.losses(step)), (lambda: net.losses(1000 + step))
    return [net.losses(step), train, valid] if rule == "forum" else [net.losses(step), valid]


BILEVEL = ("auto_lambda", "moml", "forum")


@pytest.mark.parametrize(
    "name", ["auto_lambda", *(pytest.param(n, marks=pytest.mark.slow) for n in BILEVEL[1:])]
)
def test_a_network_learns(name: str) -> None:
    net = Net()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), make_rule(name, lr=0.01))
    before = sum(net.losses(0)).item()
    for step in range(150):
        mtl_opt.step(*batches(net, name, step % 10))
    assert sum(net.losses(0)).item() < 0.7 * before
    logits = mtl_opt.core.state[MODEL]["weights" if name == "auto_lambda" else "logits"]
    assert logits[0] != logits[1]


@pytest.mark.parametrize("name", BILEVEL)
def test_looking_ahead_leaves_no_trace(name: str) -> None:
    net = Net()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
    args = batches(net, name, 0)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    versions = [param._version for param in net.parameters()]
    mtl_opt.backward(*args, retain_graph=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [param._version for param in net.parameters()] == versions
    torch.autograd.grad(args[0][0], list(net.trunk.parameters()))  # the graph is still good


@pytest.mark.parametrize("name", BILEVEL)
def test_a_closure_that_raises_leaves_no_trace(name: str) -> None:
    net = Net()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    losses, *closures = batches(net, name, 0)
    kept = {key: net.state_dict()[key].clone() for key in before}

    def broken() -> list[Tensor]:
        closures[-1]()
        raise KeyError("no data")

    with pytest.raises(KeyError):
        mtl_opt.step(losses, *closures[:-1], broken)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in net.state_dict().items())
    assert mtl_opt.core.solved == 0


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("name", BILEVEL)
def test_stopping_and_going_on_is_going_on(name: str, engine: str) -> None:
    through, stopped = Net(), Net()
    for net, stops in ((through, False), (stopped, True)):
        torch.manual_seed(1)
        mtl_opt = MTLOptimizer(torch.optim.Adam(net.parameters()), name, engine=engine)
        for step in range(6):
            if stops and step == 3:
                saved = mtl_opt.state_dict()
                mtl_opt = MTLOptimizer(torch.optim.Adam(net.parameters()), name, engine=engine)
                mtl_opt.load_state_dict(saved)
            mtl_opt.step(*batches(net, name, step))
    for ours, theirs in zip(stopped.parameters(), through.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", ["sequential", "batched", "factored"])
def test_task_gradients_of_all_parameters_are_right(engine: str) -> None:
    net = Net().eval()
    mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "moml", engine=engine)
    assert max(mtl_opt.check(net.losses(0)).values()) < 1e-5
    assert "2 tasks share" in mtl_opt.explain(net.losses(0))


def test_names_put_the_losses_of_a_closure_in_order() -> None:
    results = []
    for turned in (False, True):
        net = Net()
        mtl_opt = MTLOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "moml")

        def named(seed: int, *, net: Net = net, turned: bool = turned) -> dict[str, Tensor]:
            pairs = list(zip("ab", net.losses(seed), strict=True))
            return dict(reversed(pairs) if turned else pairs)

        torch.manual_seed(3)
        mtl_opt.step(dict(zip("ab", net.losses(0), strict=True)), lambda: named(1))
        results.append([param.clone() for param in net.parameters()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------- refusals


def refusal(error: type[Exception], sentence: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        call()


def test_what_cannot_be() -> None:
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    mtl_opt = MTLOptimizer(base, "auto_lambda")
    losses = net.losses(0)
    refusal(
        ValueError,
        "MTLOptimizer: AutoLambda takes 2 or 3 batches, got 1; pass functions that return their "
        "losses after those of the first.",
        lambda: mtl_opt.step(losses),
    )
    refusal(
        TypeError,
        "AutoLambda: the last batch is looked at from other parameters, so it must be a function "
        "that returns its losses: `step(losses, lambda: losses_of(batch))`.",
        lambda: mtl_opt.step(losses, net.losses(1)),
    )
    refusal(
        ValueError,
        "MTLOptimizer: a closure among the further batches returned no loss of '1'; it must "
        "return those of the tasks of the step.",
        lambda: mtl_opt.step(net.losses(0), lambda: net.losses(1)[:1]),
    )
    sentence = (
        "MTLOptimizer: FORUM looks at the losses at other parameters, all of them, so an engine "
        "for representations, `groups` and `capturable` cannot be; leave them out."
    )
    for options in ({"engine": "representation"}, {"groups": "tensor"}, {"capturable": True}):
        refusal(ValueError, sentence, lambda: MTLOptimizer(base, "forum", **options))  # noqa: B023


# ---------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("m", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_quadratic_over_the_simplex(m: int, scale: float) -> None:
    for seed in range(5):
        jacobian, linear = normal(m, m + 2, seed=seed), normal(m, seed=seed + 50)
        solution = simplex_qp(scale * jacobian @ jacobian.T, scale * linear)
        assert solution.residual <= 1e-8
        slopes = jacobian @ jacobian.T @ solution.value + linear
        level = slopes @ solution.value
        assert (slopes >= level - 1e-7).all()
        assert ((slopes - level).abs()[solution.value > 1e-6] <= 1e-7).all()
