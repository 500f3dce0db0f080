"""A rule on a given Jacobian, without model or optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbal.core import Core
from gradbal.decision import MODEL, Policy, decide
from gradbal.gram import combine, gram_matrix
from gradbal.registry import make_rule
from gradbal.rule import LossRule, Rule
from gradbal.survey import Survey, survey, survey_losses

LEARNED_LR = 1e-3  # for rules that would take the model's learning rate


class Aggregation(NamedTuple):
    """What a rule makes of a Jacobian.

    Attributes:
        direction: To be subtracted from the parameters, shape ``[n]``.
        weights: The direction is the sum of the rows times these, shape ``[m]``; None for
            elementwise rules.
        stats: What the rule reports, such as a solver's residual.
        state: Pass it to the next call to go on.
    """

    direction: Tensor
    weights: Tensor | None
    stats: dict[str, Any]
    state: dict[str, Any]


@torch.no_grad()
def aggregate(
    jacobian: Tensor,
    rule: str | Rule = "upgrad",
    *,
    losses: Tensor | Sequence[float] | None = None,
    more: Sequence[Tensor] = (),
    state: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Aggregation:
    """Combine task gradients as a rule does, in the length that its paper gives.

    Args:
        jacobian: Task gradients as rows, shape ``[m, n]``, floating point.
        rule: A registered name or a rule.
        losses: Losses, shape ``[m]``, for rules that look at them.
        more: Jacobians of further batches, for rules that take several.
        state: What the last call returned; None for the first step.
        generator: Source of randomness on the CPU; None for one that starts from seed 0 and goes
            on in ``state``.

    Raises:
        TypeError: If ``jacobian`` is no floating-point tensor, or a loss no number.
        ValueError: If a shape does not fit, losses are missing, or one of them or (for rules that
            look at gradients) an entry is not finite.

    Example:
        >>> jacobian = torch.tensor([[1.0, 0.0, 1.0], [-3.0, 1.0, 0.0]])
        >>> aggregate(jacobian, "upgrad").direction
        tensor([-0.7000,  0.6500,  1.2500])
    """
    rule = make_rule(rule)
    values = _check(jacobian, rule, losses, more)
    m = len(jacobian)
    core = Core(rule, tasks=m, learner="adam", seed=0)
    if state is not None:
        core.load_state_dict(state)
        core.number_tasks(None, m)
    if generator is not None:
        core.generator = generator
        core.seed = int(torch.randint(2**62, (), generator=generator))
    seen, tasks = _look(jacobian, rule, values), range(m)
    if core.awaiting:
        core.awaiting = set()
        core.observe(tasks, seen.losses)
        core.learn(rule.learned_lr or LEARNED_LR)
    eps = torch.finfo(torch.promote_types(jacobian.dtype, torch.float32)).eps
    rows = {MODEL: {0: jacobian}}
    decision = decide(core, Policy(), tasks, {MODEL: tasks}, seen, eps, rows.__getitem__)
    decision.commit(core)
    core.learn(rule.learned_lr or LEARNED_LR)
    if rule.observes:
        core.awaiting = set(tasks)
    _, ctx = decision.contexts[MODEL]
    if decision.direction is not None:
        return Aggregation(decision.direction[0], None, ctx.stats, core.state_dict())
    weights = decision.shared[MODEL].to(jacobian.device)
    direction = combine(jacobian, weights)
    return Aggregation(direction, weights.to(jacobian.dtype), ctx.stats, core.state_dict())


def _look(jacobian: Tensor, rule: Rule, losses: Tensor) -> Survey:
    """Bring what the rule looks at to where it looks.

    Raises:
        ValueError: If something is not finite.
    """
    if isinstance(rule, LossRule):
        seen = survey_losses(losses, capturable=False)
    else:
        no_heads = torch.zeros_like(losses)
        seen = survey(
            lambda scaled: {MODEL: gram_matrix(jacobian, scaled=scaled)},
            losses,
            no_heads,
            no_heads[0],
            None,
            capturable=False,
        )
    if seen.bad:
        raise ValueError(
            f"aggregate: row or loss {seen.bad[0]} is not finite; every entry must be a number."
        )
    return seen


def _check(jacobian: Tensor, rule: Rule, losses: Any, more: Sequence[Tensor]) -> Tensor:
    """Check the arguments and return the losses, shape ``[m]``, float64."""
    if not isinstance(jacobian, Tensor) or not jacobian.is_floating_point():
        kind = jacobian.dtype if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise TypeError(f"aggregate: `jacobian` must be a floating-point tensor, got {kind}.")
    if jacobian.ndim != 2 or not jacobian.numel():
        raise ValueError(
            "aggregate: `jacobian` must have shape [m, n], one row per task, "
            f"got {list(jacobian.shape)}."
        )
    if more:
        raise ValueError(
            f"aggregate: {type(rule).__name__} takes one batch, got {len(more) + 1}; leave "
            "`more` out."
        )
    if losses is None:
        if rule.needs_losses:
            raise ValueError(
                f"aggregate: {type(rule).__name__} looks at the losses; pass `losses=`, one per "
                "row."
            )
        return jacobian.new_ones(len(jacobian), dtype=torch.float64)
    try:
        values = torch.as_tensor(losses, dtype=torch.float64, device=jacobian.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"aggregate: `losses` must be numbers, one per row, got {losses!r}."
        ) from error
    if values.shape != (len(jacobian),):
        raise ValueError(
            f"aggregate: `losses` must have shape [{len(jacobian)}], got {list(values.shape)}."
        )
    return values
