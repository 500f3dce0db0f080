"""Steps to be measured: those of a user's own model, and any others."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from gradbal._utils.checks import did_you_mean
from gradbal.graph.losses import Losses, named_losses
from gradbal.lab.bench.measure import Step
from gradbal.optimizer import MTLOptimizer
from gradbal.rules._base import Rule

Evaluate = Callable[[], Losses]


def summed_step(optimizer: torch.optim.Optimizer, losses: Evaluate) -> Step:
    """Return a step down the sum of the losses, as it is without this package."""

    def step() -> None:
        optimizer.zero_grad()
        _, found = named_losses(losses())
        torch.autograd.backward(sum(found[1:], found[0]))
        optimizer.step()

    return step


def balanced_step(
    optimizer: torch.optim.Optimizer, losses: Evaluate, rule: str | Rule, **options: Any
) -> Step:
    """Return a step of a rule, with options of ``MTLOptimizer``; all batches are the same."""
    mtl_opt = MTLOptimizer(optimizer, rule, **options)
    more = [losses] * (min(mtl_opt.rule.batches) - 1)
    return lambda: mtl_opt.step(losses(), *more)


class Subject(NamedTuple):
    """What a user's function returns: a model, what computes its losses, and what steps it."""

    model: nn.Module
    losses: Evaluate
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Target:
    """A user's function, which is called anew for every step that is timed.

    Args:
        name: The function as ``module:function``; the current folder is searched first.
        function: The function.
    """

    name: str
    function: Callable[[], Any]

    @classmethod
    def find(cls, name: str) -> "Target":
        """Import the function.

        Raises:
            ValueError: If there is no such module or function.
        """
        module_name, _, function_name = name.partition(":")
        if not (module_name and function_name):
            raise ValueError(f"expected `module:function`, got {name!r}.")
        sys.path.insert(0, str(Path.cwd()))
        try:
            module = import_module(module_name)
        except ImportError as error:
            raise ValueError(f"cannot import {module_name!r} ({error}).") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            near = did_you_mean(function_name, (n for n, o in vars(module).items() if callable(o)))
            raise ValueError(f"module {module_name!r} has no function {function_name!r}.{near}")
        return cls(name, function)

    def subject(self) -> Subject:
        """Call the function; every call gives the same model.

        Raises:
            ValueError: If it returns something else.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = self.function()
        parts = given if isinstance(given, tuple) else (given,)
        kinds = (isinstance(parts[0], nn.Module), *map(callable, parts[1:2]))
        kinds += tuple(isinstance(part, torch.optim.Optimizer) for part in parts[2:])
        if not all(kinds) or len(kinds) not in (2, 3):
            listed = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(
                f"{self.name} must return (model, losses_fn) or (model, losses_fn, optimizer), "
                f"got ({listed})."
            )
        model, losses, *rest = parts
        return Subject(model, losses, *(rest or [torch.optim.AdamW(model.parameters())]))

    def summed(self) -> Step:
        """Return a step with the summed loss, of a model of its own."""
        _, losses, optimizer = self.subject()
        return summed_step(optimizer, losses)

    def balanced(self, rule: str, engine: str) -> Step:
        """Return a step with a rule and an engine, of a model of its own."""
        _, losses, optimizer = self.subject()
        return balanced_step(optimizer, losses, rule, engine=engine)
