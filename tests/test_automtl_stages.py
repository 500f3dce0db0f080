"""The steps of AutoMTL's stages against the same steps by hand, under rules of `gradbal`."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from arch_zoo import AutoMTL
from arch_zoo.automtl.stages import Batch, policy_step, pretrain_step, train_step, weight_step
from gradbal import MTLOptimizer

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict.fromkeys("ab", nn.functional.mse_loss)
LR, LAMBDA = 0.05, 0.3


def supermodel() -> AutoMTL:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.Conv2d(4, 6, 3, 1, 1), nn.Flatten())
    heads = {task: nn.Linear(6 * 9, 2) for task in "ab"}
    return AutoMTL(backbone, heads, torch.zeros(2, 3, 6, 6)).double()


def batch(seed: int = 0) -> Batch:
    generator = Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(5, *shape, generator=generator).double()  # noqa: E731
    return draw(3, 6, 6), {task: draw(2) for task in "ab"}


def weights(model: AutoMTL) -> list[nn.Parameter]:
    logits = {id(logit) for logit in model.architecture_parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in logits]


def balanced(model: AutoMTL, rule: str = "ew") -> MTLOptimizer:
    return MTLOptimizer(torch.optim.SGD(weights(model), lr=LR), rule)


def values(parameters: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def total(model: AutoMTL, choices: dict[str, Tensor], some: Batch) -> Tensor:
    inputs, targets = some
    outputs = model.decode(model.encode(inputs, choices=choices))
    return torch.stack([LOSSES[task](y, targets[task]) for task, y in outputs.items()]).sum()


def draws(seed: int = 7) -> Generator:
    return Generator().manual_seed(seed)


# ---------------------------------------------------------------------- steps by hand


def test_pretraining_takes_the_mean_of_the_branches() -> None:
    model, twin = supermodel(), supermodel()
    found = pretrain_step(model, LOSSES, balanced(model), batch())
    mean = {task: twin.policy.legal / twin.policy.legal.sum(1, keepdim=True) for task in "ab"}
    loss = total(twin, mean, batch())
    grads = torch.autograd.grad(loss, weights(twin))
    wanted = [p - LR * g for p, g in zip(weights(twin), grads, strict=True)]
    torch.testing.assert_close(values(weights(model)), values(wanted))
    assert sum(found.values()).item() == pytest.approx(loss.item())
    assert not any(loss.requires_grad for loss in found.values())
    assert not any(logit.any() for logit in model.architecture_parameters())


def test_weights_learn_under_a_sample_that_the_policy_does_not_feel() -> None:
    model, twin = supermodel(), supermodel()
    optimizer = balanced(model)
    weight_step(model, LOSSES, optimizer, batch(), generator=draws())
    loss = total(twin, twin.policy.sample(draws()), batch())
    grads = torch.autograd.grad(loss, weights(twin))
    wanted = [p - LR * g for p, g in zip(weights(twin), grads, strict=True)]
    torch.testing.assert_close(values(weights(model)), values(wanted))
    assert all(logit.grad is None for logit in model.architecture_parameters())
    assert optimizer.core.names == ["a", "b"]
    assert model.policy.tau.steps == 0


def test_the_policy_learns_from_losses_and_regulariser_and_leaves_the_weights() -> None:
    model, twin = supermodel(), supermodel()
    optimizer = torch.optim.SGD(model.architecture_parameters(), lr=LR)
    before = values(weights(model))
    found = policy_step(model, LOSSES, optimizer, batch(), weight=LAMBDA, generator=draws())
    sample = twin.policy.sample(draws())
    penalty = twin.regulariser(sample, twin.policy)
    logits = [*twin.architecture_parameters()]
    grads = torch.autograd.grad(total(twin, sample, batch()) + LAMBDA * penalty, logits)
    wanted = [p - LR * g for p, g in zip(logits, grads, strict=True)]
    torch.testing.assert_close(values(model.architecture_parameters()), values(wanted))
    assert [*found] == ["a", "b", "policy"]
    assert found["policy"].item() == pytest.approx(penalty.item())
    assert all(torch.equal(*pair) for pair in zip(weights(model), before, strict=True))
    assert all(parameter.grad is None for parameter in weights(model))
    assert model.policy.tau.steps == 1


# ---------------------------------------------------------------------- batches


def test_batches_of_some_tasks_move_these_alone() -> None:
    model = supermodel()
    x, targets = batch()
    some: Batch = ({"a": x}, {"a": targets["a"]})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    policy = torch.optim.Adam(model.architecture_parameters(), lr=LR)
    assert [*weight_step(model, LOSSES, balanced(model), some, generator=draws())] == ["a"]
    found = policy_step(model, LOSSES, policy, some, weight=LAMBDA, generator=draws())
    assert [*found] == ["a", "policy"]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    sets = model.parameter_task_sets()
    assert moved
    assert all("a" in sets[name] for name in moved)
    assert {"policy.logits.a", "heads.a.weight"} <= moved


def test_one_batch_for_each_task() -> None:
    model, twin = supermodel(), supermodel()
    (x, y), (other, z) = batch(), batch(1)
    some: Batch = ({"a": x, "b": other}, {"a": y["a"], "b": z["b"]})
    found = pretrain_step(model, LOSSES, balanced(model), some)
    lone = pretrain_step(twin, LOSSES, balanced(twin), ({"b": other}, z))
    assert found["b"].item() == pytest.approx(lone["b"].item())


def test_further_batches_go_to_rules_that_look_at_several() -> None:
    seen: list[list[float]] = []

    class Several:
        def step(self, losses: dict[str, Tensor], *more: Callable[[], dict[str, Tensor]]) -> None:
            seen.append(
                [loss.item() for some in (losses, *(m() for m in more)) for loss in some.values()]
            )

    model = supermodel()
    weight_step(model, LOSSES, Several(), batch(), batch(1), generator=draws())
    sample = model.policy.sample(draws())
    wanted = [total(model, sample, batch(seed)).item() for seed in (0, 1)]
    assert [sum(seen[0][:2]), sum(seen[0][2:])] == pytest.approx(wanted)
    optimizer = balanced(model, "modo")
    weight_step(model, LOSSES, optimizer, batch(), batch(1), generator=draws())


# ---------------------------------------------------------------------- rules


@pytest.mark.parametrize("rule", ["ew", "uw", "famo", "pcgrad", "upgrad", "graddrop"])
def test_any_rule_learns_in_all_stages(rule: str) -> None:
    """FAMO waits for the losses of the next step, whatever stage that belongs to."""
    model, generator = supermodel(), draws()
    optimizer = balanced(model, rule)
    policy = torch.optim.Adam(model.architecture_parameters(), lr=LR)
    first = pretrain_step(model, LOSSES, optimizer, batch())
    for _ in range(15):
        pretrain_step(model, LOSSES, optimizer, batch())
        policy_step(model, LOSSES, policy, batch(), weight=LAMBDA, generator=generator)
        weight_step(model, LOSSES, optimizer, batch(), generator=generator)
    last = pretrain_step(model, LOSSES, optimizer, batch())
    assert sum(last.values()) < 0.9 * sum(first.values())
    lowered = model.lower()
    after = MTLOptimizer(torch.optim.SGD(lowered.parameters(), lr=LR), rule)
    losses = [train_step(lowered, LOSSES, after, batch()) for _ in range(10)]
    assert sum(losses[-1].values()) < sum(losses[0].values())


@pytest.mark.parametrize("rule", ["upgrad", "rlw"])
def test_the_same_draws_give_the_same_steps(rule: str) -> None:
    def run(seed: int) -> list[Tensor]:
        model, generator = supermodel(), draws(seed)
        optimizer = balanced(model, rule)
        policy = torch.optim.Adam(model.architecture_parameters(), lr=LR)
        for seed in range(3):
            policy_step(model, LOSSES, policy, batch(seed), weight=LAMBDA, generator=generator)
            weight_step(model, LOSSES, optimizer, batch(seed), generator=generator)
        return values(model.parameters())

    assert all(torch.equal(*pair) for pair in zip(run(1), run(1), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(run(1), run(2), strict=True))


def test_a_plain_optimizer_is_told_to_be_wrapped() -> None:
    model = supermodel()
    plain: Any = torch.optim.Adam(weights(model))
    whole = re.escape(
        "AutoMTL: `optimizer` must step on losses by task, got Adam. Wrap it, as "
        "gradbal.MTLOptimizer does."
    )
    with pytest.raises(TypeError, match=f"^{whole}$"):
        pretrain_step(model, LOSSES, plain, batch())
