"""Every bad option is told in one sentence, when the optimizer is built."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Toy, says, wrapped
from torch import nn

from gradbal import MTLOptimizer, chain, engines, make_rule, register

SGD = torch.optim.SGD


# ---------------------------------------------------------------------- when it is built

BUILT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": "SUM"}, ValueError, "`scale` must be one of 'sum', 'native', got 'SUM'."),
    ({"heads": 3}, ValueError, "`heads` must be one of 'plain', 'weighted', None, got 3."),
    (
        {"on_nonfinite": "ignore"},
        ValueError,
        "`on_nonfinite` must be one of 'raise', 'skip', 'absent', 'propagate', None, got 'ignore'.",
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
        "none of the 2 parameters named in `shared`, `groups` or `gram_over` belongs to "
        "the base optimizer; name parameters that it was built with.",
    ),
    (
        {"groups": {"a": nn.Linear(1, 1)}},
        ValueError,
        "none of the 2 parameters named in `shared`, `groups` or `gram_over` belongs to "
        "the base optimizer; name parameters that it was built with.",
    ),
    (
        {"engine": "vmap"},
        ValueError,
        "`engine` must be one of 'auto', 'sequential', 'batched', 'factored', 'streaming', "
        "'sketched', 'representation', got 'vmap'.",
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
        "Representation gives one Gram matrix, so `groups` needs another engine, such as "
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
        "MTLOptimizer: expected a torch optimizer, got int; build one first, such as "
        "torch.optim.AdamW(model.parameters()).",
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
