"""Every bad call is told in one sentence, and nothing has changed."""

from typing import Any

import numpy as np
import pytest
import torch
from models import Toy, everything, fill, param, says, wrapped
from torch import Tensor, nn

from gradbal import engines, make_rule

W = param(3, seed=1)
LOSSES: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "Losses: expected at least one loss, got none."),
    ((), ValueError, "Losses: expected at least one loss, got none."),
    ({}, ValueError, "Losses: expected at least one loss, got none."),
    (torch.ones(0), ValueError, "Losses: expected at least one loss, got none."),
    (
        W.sum(),
        TypeError,
        "Losses: expected one loss per task, got a tensor of shape []; give a list, a mapping or "
        "a 1-D tensor, and do not add the losses up.",
    ),
    (
        torch.ones(2, 2),
        TypeError,
        "Losses: expected one loss per task, got a tensor of shape [2, 2]; give a list, a mapping "
        "or a 1-D tensor, and do not add the losses up.",
    ),
    (
        "losses",
        TypeError,
        "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, got str.",
    ),
    (
        3.0,
        TypeError,
        "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, got float.",
    ),
    (
        np.ones(2),
        TypeError,
        "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, got ndarray.",
    ),
    (
        {W.sum()},
        TypeError,
        "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, got set.",
    ),
    (
        {1.5: W.sum()},
        TypeError,
        "Losses: task names must be strings or integers, got 1.5; name each loss with one.",
    ),
    (
        [W.sum(), 1.0],
        TypeError,
        "Losses: the loss of task 1 is the number 1.0, which has no graph (was it `.item()`?); "
        "give the tensor, or leave a task without labels out.",
    ),
    (
        {"depth": "none", "seg": W.sum()},
        TypeError,
        "Losses: the loss of task 'depth' must be a tensor, got str.",
    ),
    (
        [W.sum(), W],
        ValueError,
        "Losses: the loss of task 1 must be a scalar, got shape [3]; reduce it with .mean() or "
        ".sum().",
    ),
    (
        {"seg": W.sum(), "depth": W[:0]},
        ValueError,
        "Losses: the loss of task 'depth' must be a scalar, got shape [0]; reduce it with .mean() "
        "or .sum().",
    ),
    (
        [W.sum(), torch.tensor(3)],
        TypeError,
        "Losses: the loss of task 1 must be a real floating-point tensor, got torch.int64.",
    ),
    (
        [W.sum() * 1j],
        TypeError,
        "Losses: the loss of task 0 must be a real floating-point tensor, got torch.complex128.",
    ),
    (
        [torch.ones(()), torch.ones(())],
        ValueError,
        "Losses: no loss has a graph, so there is nothing to differentiate; compute at least one "
        "from parameters that require gradients.",
    ),
    (
        torch.ones(3),
        ValueError,
        "Losses: no loss has a graph, so there is nothing to differentiate; compute at least one "
        "from parameters that require gradients.",
    ),
]


@pytest.mark.parametrize("method", ["step", "backward", "pending", "check", "explain"])
@pytest.mark.parametrize("rule", ["ew", "upgrad"])
@pytest.mark.parametrize(("losses", "error", "sentence"), LOSSES)
def test_losses(losses: Any, error: type[Exception], sentence: str, rule: str, method: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    before = everything(model, optimizer)
    call = {
        "step": lambda: optimizer.step(losses),
        "backward": lambda: optimizer.backward(losses),
        "pending": lambda: optimizer.backward(losses, accumulate=True),
        "check": lambda: optimizer.check(losses),
        "explain": lambda: optimizer.explain(losses),
    }[method]
    says(error, sentence, call)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("rule", ["ew", "uw", "upgrad", "graddrop"])
def test_parameters_of_another_model(rule: str) -> None:
    model, other = Toy(), Toy()
    optimizer = wrapped(model, rule)
    sentence = (
        "MTLOptimizer: the losses reach no parameter of the base optimizer; build it with the "
        "parameters of the model that made them."
    )
    for call in (optimizer.step, optimizer.backward):
        before = everything(model, optimizer)
        says(ValueError, sentence, lambda call=call: call(other.losses()))
        assert everything(model, optimizer) == before


def test_names_after_a_list() -> None:
    model = Toy()
    optimizer = wrapped(model, "uw")
    optimizer.step(model.losses())
    says(
        ValueError,
        "Losses: expected a name for each of the 3 tasks known by number only, got 2; name all of "
        "them once, or use `tasks=`.",
        lambda: optimizer.step(dict(zip("ab", model.losses()[:2], strict=True))),
    )


@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_losses_of_several_batches(rule: str) -> None:
    model = Toy()
    optimizer = wrapped(model, rule)
    name = type(optimizer.rule).__name__
    before = everything(model, optimizer)
    sentence = f"MTLOptimizer: {name} takes 1 batch, got 3; leave the others out."
    args = (model.losses(), model.losses(1), model.losses(2))
    says(ValueError, sentence, lambda: optimizer.step(*args))
    says(ValueError, sentence, lambda: optimizer.backward(*args))
    assert everything(model, optimizer) == before


def test_a_number_per_task_for_another_number_of_tasks() -> None:
    model = Toy()
    optimizer = wrapped(model, make_rule("upgrad", preferences=(0.5, 0.5)))
    before = everything(model, optimizer)
    says(
        ValueError,
        "UPGrad: `preferences` must have one number for each of the 3 tasks, got 2.",
        lambda: optimizer.step(model.losses()),
    )
    assert everything(model, optimizer) == before


def test_gradients_that_vanish_from_the_graph() -> None:
    """A graph that was gone through already; torch says it, and nothing has changed."""
    model = Toy()
    for rule in ("ew", "upgrad", "graddrop"):
        optimizer = wrapped(model, rule)
        losses = model.losses()
        optimizer.backward(losses)
        before = everything(model, optimizer)
        with pytest.raises(RuntimeError, match="is used up"):
            optimizer.backward(losses)
        assert everything(model, optimizer) == before
        optimizer.zero_grad()


# ---------------------------------------------------------------------- representations


def test_a_module_that_never_ran() -> None:
    model, idle = Toy(), nn.Linear(2, 2)
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(model.trunk, idle))
    before = everything(model, optimizer)
    says(
        RuntimeError,
        "Representation: module 1 of those named took no part in these losses; name modules whose "
        "outputs the losses depend on.",
        lambda: optimizer.step(model.losses()),
    )
    assert everything(model, optimizer) == before


def test_a_module_that_ran_for_something_else() -> None:
    model = Toy()
    idle = nn.Linear(2, 2)
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(idle))
    idle(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="module 0 of those named took no part"):
        optimizer.step(model.losses())


def test_inputs_of_its_own_for_every_task_without_pooling() -> None:
    model = Toy()
    optimizer = wrapped(model, "upgrad", engine=engines.Representation(model.trunk))
    before = everything(model, optimizer)
    says(
        RuntimeError,
        "Representation: each task has inputs of its own, and gradients for different inputs share "
        'no space; pass pool="batch" to sum them over the batch, or choose another engine.',
        lambda: optimizer.step([model.losses(k)[k] for k in range(3)]),
    )
    assert everything(model, optimizer) == before


def test_no_representation_to_be_found() -> None:
    a, b = fill(nn.Linear(4, 1)), fill(nn.Linear(4, 1))
    x = torch.ones(2, 4).double()

    def losses() -> list[Tensor]:
        return [a(x).mean() + b(x).mean(), (a(x * 2) * b(x * 2)).mean()]

    optimizer = wrapped([*a.parameters(), *b.parameters()], "upgrad", engine="representation")
    says(
        RuntimeError,
        "Representation: the tasks' graphs meet in parameters only, so there is no representation "
        "to look at; name a module or choose another engine.",
        lambda: optimizer.step(losses()),
    )


# ---------------------------------------------------------------------- several processes


def test_process_group_is_a_group() -> None:
    says(
        TypeError,
        'MTLOptimizer: `process_group` must be "auto", a group of torch.distributed or None, got '
        "3.",
        lambda: wrapped(Toy(), "upgrad", process_group=3),
    )


@pytest.mark.parametrize("name", ["gls", "mgda"])
def test_losses_that_must_be_positive(name: str) -> None:
    model = Toy()
    rule = make_rule(name, **({"normalize": "loss"} if name == "mgda" else {}))
    optimizer = wrapped(model, rule)
    before = everything(model, optimizer)
    losses = model.named()
    losses["b"] = losses["b"] - losses["b"].detach() - 2.0
    says(
        ValueError,
        f"{type(rule).__name__}: losses must be > 0, got -2 for task 'b'; shift the loss or choose "
        "a rule that does not take its logarithm.",
        lambda: optimizer.step(losses),
    )
    assert everything(model, optimizer) == before
