"""Small SGD and Adam for what a rule learns: closed-form gradients, one number per task."""

import torch
from torch import Tensor

from gradbal.rules._base import Rule, State

BETAS, EPS = (0.9, 0.999), 1e-8


def slots(name: str, tensor: Tensor, learner: str) -> State:
    """Return what the learner itself remembers about a tensor; nothing but for Adam.

    Steps are counted per task, so that an absent task's moments stay as they are.
    """
    if learner != "adam":
        return {}
    return {f"{name}.{slot}": torch.zeros_like(tensor) for slot in ("steps", "mean", "square")}


def advance(
    rule: Rule,
    state: State,
    name: str,
    grad: Tensor,
    moving: Tensor | None,
    lr: float | Tensor,
    learner: str,
) -> None:
    """Step one tensor of a state.

    Args:
        rule: Knows its own step, for the learner ``"proximal"``.
        state: Where the tensor and its slots are; entries are replaced.
        name: Which tensor.
        grad: Its gradient, of the same shape.
        moving: Where it may move; elsewhere tensor and slots stay, bool. None for everywhere.
        lr: Learning rate.
        learner: ``"sgd"``, ``"proximal"`` or ``"adam"`` (Kingma and Ba, ICLR 2015, with its
            default constants).
    """
    value = state[name]
    lr = lr.to(value.device) if isinstance(lr, Tensor) else lr
    if learner != "adam":
        new_value = (
            rule.proximal(name, value, grad, lr) if learner == "proximal" else value - lr * grad
        )
        state[name] = new_value if moving is None else torch.where(moving, new_value, value)
        return
    steps, mean, square = (state[f"{name}.{slot}"] for slot in ("steps", "mean", "square"))
    new_steps = steps + 1
    new_mean = mean.lerp(grad, 1 - BETAS[0])
    new_square = square.lerp(grad.square(), 1 - BETAS[1])
    size = (new_square / (1 - BETAS[1] ** new_steps)).sqrt() + EPS
    new_value = value - lr * (new_mean / (1 - BETAS[0] ** new_steps)) / size
    for slot, old, new in (
        (name, value, new_value),
        (f"{name}.steps", steps, new_steps),
        (f"{name}.mean", mean, new_mean),
        (f"{name}.square", square, new_square),
    ):
        state[slot] = new if moving is None else torch.where(moving, new, old)
