"""The stages of AutoMTL as steps, which own neither loader nor optimizer.

A batch is a pair of inputs and targets by task; the losses are functions of outputs and targets by
task. Every step takes all tasks at once and returns their losses, detached.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, Protocol, TypeAlias

import torch
from torch import Generator, Tensor

from arch_zoo.automtl.supermodel import AutoMTL
from arch_zoo.inputs import Inputs
from arch_zoo.model import MultiTaskModel

Batch: TypeAlias = tuple[Inputs, Mapping[str, Tensor]]
Losses: TypeAlias = Mapping[str, Callable[[Tensor, Tensor], Tensor]]


class WeightOptimizer(Protocol):
    """Turns several losses into one step, as ``gradbal.MTLOptimizer`` does."""

    def step(self, losses: Mapping[str, Tensor], *more: Callable[[], Any]) -> Any:
        """Step on losses by task; rules that look at several batches get the others' as calls."""


def pretrain_step(
    model: AutoMTL, losses: Losses, optimizer: WeightOptimizer, batch: Batch, *more: Batch
) -> dict[str, Tensor]:
    """Learn the weights with the mean of all branches.

    Args:
        model: The supermodel.
        losses: By task.
        optimizer: Of all parameters but the logits.
        batch: To learn from.
        *more: Further batches, for rules that look at several.

    Returns:
        The losses of the batch by task, each without dimensions.

    Raises:
        TypeError: If the optimizer takes no losses.
    """
    return train_step(model, losses, optimizer, batch, *more, choices=model.policy.uniform())


def weight_step(
    model: AutoMTL,
    losses: Losses,
    optimizer: WeightOptimizer,
    batch: Batch,
    *more: Batch,
    generator: Generator | None = None,
) -> dict[str, Tensor]:
    """Learn the weights with branches mixed as the policy says, which stays as it is.

    Args:
        model: The supermodel.
        losses: By task.
        optimizer: Of all parameters but the logits.
        batch: To learn from.
        *more: Further batches, for rules that look at several.
        generator: Draws the sample of the policy, one for all these batches.

    Returns:
        The losses of the batch by task, each without dimensions.

    Raises:
        TypeError: If the optimizer takes no losses.
    """
    with torch.no_grad():
        choices = model.policy.sample(generator)
    return train_step(model, losses, optimizer, batch, *more, choices=choices)


def policy_step(
    model: AutoMTL,
    losses: Losses,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    weight: float,
    generator: Generator | None = None,
) -> dict[str, Tensor]:
    """Learn the policy, then cool it; the weights get no gradient.

    The logits of a task concern this task alone, so there is no conflict for a rule to resolve.

    Args:
        model: The supermodel.
        losses: By task.
        optimizer: Of the logits, any of torch's.
        batch: To learn from, best of examples that the weights do not learn from.
        weight: Of the regulariser.
        generator: Draws the sample of the policy.

    Returns:
        The losses by task, and the regulariser as ``"policy"``, each without dimensions.
    """
    choices = model.policy.sample(generator)
    found = _losses_of(model, losses, batch, choices=choices)
    penalty = model.regulariser({task: choices[task] for task in found}, model.policy)
    total = torch.stack(list(found.values())).sum() + weight * penalty
    logits = list(model.architecture_parameters())
    grads = torch.autograd.grad(total, logits, allow_unused=True)
    for logit, grad in zip(logits, grads, strict=True):
        logit.grad = grad
    optimizer.step()
    tau: Any = model.policy.tau  # of the user, who may have made another
    tau.step()
    return _detached({**found, "policy": penalty})


def train_step(
    model: MultiTaskModel,
    losses: Losses,
    optimizer: WeightOptimizer,
    batch: Batch,
    *more: Batch,
    **given: Any,  # what the model's `encode` names
) -> dict[str, Tensor]:
    """Learn the weights of any model, such as the lowered one.

    Args:
        model: A model of several tasks.
        losses: By task.
        optimizer: Of the parameters to learn.
        batch: To learn from.
        *more: Further batches, for rules that look at several.
        **given: Further inputs of the model, by name.

    Returns:
        The losses of the batch by task, each without dimensions.

    Raises:
        TypeError: If the optimizer takes no losses.
    """
    if "losses" not in signature(optimizer.step).parameters:
        raise TypeError(
            "AutoMTL: `optimizer` must step on losses by task, got "
            f"{type(optimizer).__name__}. Wrap it, as gradbal.MTLOptimizer does."
        )
    found = _losses_of(model, losses, batch, **given)
    optimizer.step(found, *(partial(_losses_of, model, losses, other, **given) for other in more))
    return _detached(found)


def _losses_of(
    model: MultiTaskModel, losses: Losses, batch: Batch, **given: Any
) -> dict[str, Tensor]:
    inputs, targets = batch
    outputs = model.decode(model.encode(inputs, **given))
    return {task: losses[task](output, targets[task]) for task, output in outputs.items()}


def _detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses.items()}
