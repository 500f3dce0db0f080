"""Rules alone, without model or optimizer."""

from collections.abc import Sequence
from typing import Any

import torch

from gradbal.aggregation import aggregate
from gradbal.cli import further
from gradbal.rules._base import Rule
from gradbal.rules._registry import make_rule

WIDTH = 2000  # entries of a task gradient


def rule_times(
    rules: Sequence[str], tasks: Sequence[int], seconds: float = 0.05
) -> list[tuple[str, ...]]:
    """Show the microseconds of ``gradbal.aggregate`` on random task gradients of length ``WIDTH``.

    Args:
        rules: Names of the rules.
        tasks: Numbers of tasks.
        seconds: How long to time each rule with each number of tasks.

    Raises:
        ValueError: If a rule is unknown, or a number of tasks is none.
    """
    if min(tasks) < 1:
        raise ValueError(f"`tasks` must be >= 1, got {min(tasks)}.")
    rows = [
        (name, *(_microseconds(make_rule(name), n_tasks, seconds) for n_tasks in tasks))
        for name in rules
    ]
    return [("rule", *(f"{n_tasks} tasks" for n_tasks in tasks)), *rows]


def _microseconds(rule: Rule, n_tasks: int, seconds: float) -> str:
    """Time a rule from its second step on."""
    from torch.utils.benchmark import Timer  # heavy; on a CUDA build it looks for a compiler

    jacobian = torch.randn(n_tasks, WIDTH, generator=torch.Generator().manual_seed(n_tasks))
    losses = torch.linspace(1, 2, n_tasks)
    given: dict[str, Any] = {"losses": losses, "more": further(rule, jacobian, losses)}
    given["state"] = aggregate(jacobian, rule, **given).state
    known = {"aggregate": aggregate, "jacobian": jacobian, "rule": rule, "given": given}
    timer = Timer("aggregate(jacobian, rule, **given)", globals=known)
    return f"{1e6 * timer.blocked_autorange(min_run_time=seconds).median:.0f}"
