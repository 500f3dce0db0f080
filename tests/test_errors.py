"""Every bad argument is told in one sentence, and nothing has changed."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Toy, everything, fill, param, wrapped
from torch import Tensor, nn

from gradbal import MTLOptimizer, chain, engines, make_rule, register

SGD = torch.optim.SGD


def says(error: type[Exception], sentence: str, call: Callable[[], Any]) -> None:
    """Check the whole message, from its first to its last character."""
    with pytest.raises(error, match=f"^{re.escape(sentence)}$") as caught:
        call()
    text = str(caught.value)
    assert text[0].isupper() or text.split(":")[0].islower()
    assert text.endswith(".")


# ---------------------------------------------------------------------- when it is built

BUILT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": "SUM"}, ValueError, "`scale` must be one of 'sum', 'native', got 'SUM'."),
    ({"heads": 3}, ValueError, "`heads` must be one of 'plain', 'weighted', None, got 3."),
    (
        {"on_nonfinite": "ignore"},
        ValueError,
        "`on_nonfinite` must be one of 'raise', 'skip', 'propagate', None, got 'ignore'.",
    ),
    ({"update_every": 0}, ValueError, "`update_every` must be >= 1, got 0."),
    ({"update_every": 2.0}, TypeError, "`update_every` must be an int, got 2.0."),
    ({"update_every": True}, TypeError, "`update_every` must be an int, got True."),
    ({"seed": "x"}, TypeError, "`seed` must be an int, got 'x'."),
    ({"learned_lr": 0}, ValueError, "`learned_lr` must be > 0, got 0."),
    ({"learned_lr": -0.5}, ValueError, "`learned_lr` must be > 0, got -0.5."),
    ({"learned_lr": float("nan")}, ValueError, "`learned_lr` must be > 0, got nan."),
    ({"learned_lr": "x"}, TypeError, "`learned_lr` must be a number, got 'x'."),
    ({"capturable": "x"}, ValueError, "`capturable` must be one of True, False, got 'x'."),
    ({"process_group": "x"}, ValueError, "`process_group` must be one of 'auto', None, got 'x'."),
    ({"groups": "layer"}, ValueError, "`groups` must be one of 'model', 'tensor', got 'layer'."),
    ({"groups": 3}, ValueError, "`groups` must be one of 'model', 'tensor', got 3."),
    ({"groups": {}}, ValueError, "`groups` must name at least one group, got {}."),
    (
        {"groups": {"a": [3]}},
        TypeError,
        "expected a module, parameters or a list of these, got 3.",
    ),
    (
        {"shared": "trunk"},
        TypeError,
        "expected a module, parameters or a list of these, got 'trunk'.",
    ),
    (
        {"shared": nn.Linear(1, 1)},
        ValueError,
        "none of the 2 parameters named in `shared` or `groups` belongs to the base optimizer; "
        "name parameters that it was built with.",
    ),
    (
        {"groups": {"a": nn.Linear(1, 1)}},
        ValueError,
        "none of the 2 parameters named in `shared` or `groups` belongs to the base optimizer; "
        "name parameters that it was built with.",
    ),
    (
        {"engine": "vmap"},
        ValueError,
        "`engine` must be one of 'auto', 'sequential', 'batched', 'representation', got 'vmap'.",
    ),
    ({"engine": 3}, TypeError, "`engine` must be a name or one of gradbal.engines, got 3."),
    (
        {"tasks": "depth"},
        TypeError,
        "`tasks` must be a list of names or their number, got 'depth'.",
    ),
    ({"tasks": [1, 2]}, TypeError, "`tasks` must be a list of names or their number, got [1, 2]."),
    ({"tasks": []}, TypeError, "`tasks` must be a list of names or their number, got []."),
    ({"tasks": True}, TypeError, "`tasks` must be a list of names or their number, got True."),
    ({"tasks": 0}, ValueError, "`tasks` must be >= 1, got 0."),
    ({"tasks": ["a", "a"]}, ValueError, "`tasks` must be distinct names, got ['a', 'a']."),
    (
        {"rule": "graddrop", "update_every": 2},
        ValueError,
        "GradDrop works entry by entry and has no weights, so `update_every` > 1 cannot be; "
        "choose a rule with weights or leave the option out.",
    ),
    (
        {"rule": "graddrop", "heads": "weighted"},
        ValueError,
        'GradDrop works entry by entry and has no weights, so `heads="weighted"` cannot be; '
        "choose a rule with weights or leave the option out.",
    ),
    (
        {"rule": "uw", "groups": "tensor"},
        ValueError,
        "UW looks at the losses alone, so `groups` would change nothing; leave it out.",
    ),
    (
        {"rule": "mgda", "groups": "tensor", "heads": "weighted"},
        ValueError,
        "with `groups` a task has several weights and its head cannot take one; pass "
        'heads="plain".',
    ),
    (
        {"rule": "nash_mtl", "groups": "tensor"},
        ValueError,
        "with `groups` a task has several weights and its head cannot take one; pass "
        'heads="plain".',
    ),
    (
        {"groups": "tensor", "update_every": 2},
        ValueError,
        "weights of several `groups` cannot be reused in one pass; leave out `update_every`.",
    ),
    (
        {"groups": "tensor", "engine": "representation"},
        ValueError,
        "a representation gives one Gram matrix, so `groups` needs another engine, such as "
        "Sequential.",
    ),
    (
        {"rule": make_rule("upgrad", solver="cvxpy"), "capturable": True},
        ValueError,
        'solver="cvxpy" runs on the host, so it cannot be captured; leave `capturable` or the '
        "solver out.",
    ),
]


@pytest.mark.parametrize(("options", "error", "sentence"), BUILT, ids=lambda value: str(value)[:40])
def test_options(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    base = SGD(Toy().parameters(), lr=0.1)
    says(error, f"MTLOptimizer: {sentence}", lambda: MTLOptimizer(base, **options))


def test_overlapping_groups() -> None:
    model = Toy()
    says(
        ValueError,
        "MTLOptimizer: parameter 0 is in the groups 'a' and 'b'; each may be in one.",
        lambda: wrapped(model, groups={"a": model.trunk, "b": model.trunk[0].weight}),
    )


def test_the_base_must_be_a_torch_optimizer() -> None:
    says(
        TypeError,
        "MTLOptimizer: expected a torch optimizer, got 3.",
        lambda: MTLOptimizer(3),  # type: ignore[arg-type]  # that is the point
    )
    says(
        TypeError,
        "MTLOptimizer: the base is an MTLOptimizer already; wrap a plain optimizer.",
        lambda: MTLOptimizer(wrapped(Toy())),
    )


RULES: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (
        "nash_mlt",
        {},
        ValueError,
        "Unknown rule 'nash_mlt'. Did you mean 'nash_mtl'? `gradbal.rule_names()` lists all of "
        "them.",
    ),
    ("xyz", {}, ValueError, "Unknown rule 'xyz'. `gradbal.rule_names()` lists all of them."),
    (
        3,
        {},
        TypeError,
        "A rule must be a registered name or a Rule object, got 3; `gradbal.rule_names()` lists "
        "all names.",
    ),
    (
        "cagrad",
        {"C": 1.0},
        ValueError,
        "CAGrad: unknown option 'C'. Did you mean 'c'? Its options: c, rescale, solver.",
    ),
    (
        "mgda",
        {"normalise": "l2"},
        ValueError,
        "MGDA: unknown option 'normalise'. Did you mean 'normalize'? Its options: normalize, "
        "solver.",
    ),
    ("nash_mtl", {"max_norm": -1.0}, ValueError, "NashMTL: `max_norm` must be > 0, got -1.0."),
    ("cagrad", {"c": -1}, ValueError, "CAGrad: `c` must be >= 0, got -1."),
    ("graddrop", {"leak": 2.0}, ValueError, "GradDrop: `leak` must be between 0 and 1, got 2.0."),
    (
        "mgda",
        {"normalize": "max"},
        ValueError,
        "MGDA: `normalize` must be one of 'none', 'l2', 'loss', 'loss+', got 'max'.",
    ),
]


@pytest.mark.parametrize(("name", "options", "error", "sentence"), RULES)
def test_rules(name: Any, options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    says(error, sentence, lambda: make_rule(name, **options))
    if not options:
        says(error, sentence, lambda: wrapped(Toy(), name))


def test_options_beside_a_rule_object() -> None:
    with pytest.raises(TypeError, match=r"use dataclasses\.replace to change a rule object"):
        make_rule(make_rule("cagrad"), c=0.5)


def test_registering() -> None:
    says(
        ValueError,
        "register: the name 'ew' is taken by EW; choose another.",
        lambda: register("ew")(type(make_rule("mgda"))),
    )
    with pytest.raises(TypeError, match=r"^register: 'new' must decorate a LossRule, a GramRule"):
        register("new")(int)  # type: ignore[type-var]  # that is the point


def test_chains() -> None:
    says(
        TypeError,
        "chain: expected transforms and, at the end, a rule, got nothing.",
        chain,
    )
    with pytest.raises(ValueError, match=r"^chain: unknown transform 'log_loses'\. Did you mean"):
        chain("log_loses", "mgda")


ENGINES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: engines.Batched(chunk_size=0),
        ValueError,
        "Batched: `chunk_size` must be >= 1, got 0.",
    ),
    (
        lambda: engines.Representation("encoder"),  # type: ignore[arg-type]
        TypeError,
        "Representation: expected modules, got str; name the encoder itself, for example "
        "`Representation(model.encoder)`.",
    ),
    (
        lambda: engines.Representation(nn.Linear(1, 1), pool="mean"),
        ValueError,
        "Representation: `pool` must be one of 'batch', None, got 'mean'.",
    ),
    (
        lambda: engines.Representation(pool="batch"),
        ValueError,
        "Representation: `pool` needs the module to be named.",
    ),
]


@pytest.mark.parametrize(("build", "error", "sentence"), ENGINES)
def test_engines(build: Callable[[], Any], error: type[Exception], sentence: str) -> None:
    says(error, sentence, build)


# ---------------------------------------------------------------------- losses

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
    ({1: W.sum()}, TypeError, "Losses: task names must be strings, got 1."),
    (
        [W.sum(), 1.0],
        TypeError,
        "Losses: the loss of task 1 must be a tensor, got float.",
    ),
    (
        {"depth": None, "seg": W.sum()},
        TypeError,
        "Losses: the loss of task 'depth' must be a tensor, got NoneType.",
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
    sentence = (
        f"MTLOptimizer: {name} takes the losses of one batch, got those of 3; leave the others out."
    )
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
        with pytest.raises(RuntimeError, match="second time"):
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


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *args: 2)
    model = Toy()
    optimizer = wrapped(model, "upgrad")
    before = everything(model, optimizer)
    says(
        RuntimeError,
        "MTLOptimizer: task gradients are not averaged over the 2 processes yet, so their models "
        "would drift apart; pass process_group=None if each process trains a model of its own.",
        lambda: optimizer.step(model.losses()),
    )
    assert everything(model, optimizer) == before
    wrapped(model, "upgrad", process_group=None).step(model.losses())


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
