"""A rule on a given Jacobian, without model or optimizer."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradbal._utils import checks
from gradbal.rules._base import (
    Context,
    Direction,
    GradientRule,
    LossRule,
    Probed,
    Rule,
    State,
    WeightRule,
    Weights,
)
from gradbal.rules._learned import advance
from gradbal.rules._names import RuleName
from gradbal.rules._registry import make_rule
from gradbal.rules._state import state_like
from gradbal.solvers.gram import (
    ROW_NOISE,
    by_batch,
    combine,
    combine_tiny,
    gram_matrix,
    needs_scaling,
    outside_autocast,
    total_gram,
    total_vector,
)

Elsewhere = Callable[[Tensor], tuple[Tensor, Tensor]]  # displacement [n] -> losses [m], rows [m, n]

_KINDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = {dtype: torch.promote_types(dtype, torch.float32) for dtype in _KINDS}  # to sum in
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


@outside_autocast
def aggregate(
    jacobian: Tensor,
    rule: RuleName | str | Rule = "upgrad",
    *,
    losses: Tensor | Sequence[float] | None = None,
    more: Sequence[Tensor | Elsewhere] = (),
    state: Mapping[str, Any] | None = None,
    generator: torch.Generator | None = None,
) -> Aggregation:
    """Combine task gradients as a rule does, in the length that its paper gives.

    Args:
        jacobian: Task gradients as rows, shape ``[m, n]``, floating point.
        rule: A registered name or a rule.
        losses: Losses, shape ``[m]``, for rules that look at them.
        more: Jacobians of further batches, for rules that take several. For rules that look at
            the losses at other parameters also functions, from a displacement of the parameters,
            shape ``[n]``, to losses, shape ``[m]``, and Jacobian there.
        state: What the last call returned; None for the first step.
        generator: Source of randomness on the CPU; None for one that depends on the number of
            the step alone.

    Raises:
        TypeError: If ``jacobian`` is no floating-point tensor, or a loss no number.
        ValueError: If a shape does not fit, losses are missing, one of them or (for rules that
            look at gradients) an entry is not finite, or ``state`` belongs to another rule.

    Example:
        >>> jacobian = torch.tensor([[1.0, 0.0, 1.0], [-3.0, 1.0, 0.0]])
        >>> aggregate(jacobian, "upgrad").direction
        tensor([-0.7000,  0.6500,  1.2500])
    """
    rule = make_rule(rule)
    jacobian, values = check_arguments(jacobian, rule, losses, more)
    gram, tiny = None, False
    if isinstance(rule, GradientRule):
        check_rows(jacobian)
        values = values.cpu()
    elif not isinstance(rule, LossRule):
        found = [jacobian, *(rows.detach() for rows in more if isinstance(rows, Tensor))]
        (gram, tiny), values = host_gram(found), values.cpu()
    ctx = _context(rule, jacobian, values, state, generator)
    if isinstance(rule, GradientRule):
        ctx.more = [[rows.detach()] if isinstance(rows, Tensor) else partial(rows) for rows in more]
        ctx.probe = _probe
        result = rule.direction([jacobian], [0], ctx)
    elif gram is None:
        result = _ask(rule, values, ctx)
    else:
        if more:
            ctx.cross = by_batch(gram, len(found))
            gram = ctx.cross[0, 0]
        result = _ask(rule, gram, ctx)
    kept = _kept(rule, ctx)
    if isinstance(result, Weights):
        result = result.shared
    if isinstance(result, Tensor):
        weights = result.to(jacobian)
        if tiny:
            direction = combine_tiny(jacobian, result.to(jacobian.device))
        else:
            cancels = gram is not None and _cancels(gram, result)
            given = weights if jacobian.dtype in _PLAIN and not cancels else result
            direction = combine(jacobian, given.to(jacobian.device), precise=cancels)
        return Aggregation(direction, weights, ctx.stats, kept)
    shared = result.shared if isinstance(result, Direction) else result
    return Aggregation(shared[0].to(jacobian.dtype), None, ctx.stats, kept)


def _cancels(gram: Tensor, weights: Tensor) -> bool:
    """Say whether the weighted rows are much longer than their sum, so that rounding shows."""
    parts = (weights.abs() @ gram.diagonal().sqrt()).square()
    return bool(parts > CANCELLING**2 * (weights @ gram @ weights))


def _ask(rule: Rule, signal: Tensor, ctx: Context) -> Tensor | Weights:
    if not isinstance(rule, WeightRule):
        raise TypeError(f"{type(rule).__name__}: must be a LossRule, GramRule or GradientRule.")
    return rule.weights(signal, ctx)


def _context(
    rule: Rule,
    jacobian: Tensor,
    losses: Tensor,
    state: Mapping[str, Any] | None,
    generator: torch.Generator | None,
) -> Context:
    """Show the rule what it remembers, and the losses if it has waited for them."""
    values = losses.tolist()
    check_finite(values)
    step, tensors, buffers = _recalled(rule, losses, state)
    seed = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
    if isinstance(rule, GradientRule):
        buffers = buffers or rule.buffers(jacobian)
        check_width(buffers, jacobian)
    ctx = Context(
        losses=losses,
        state=tensors,
        source=generator,
        step=step,
        seed=seed,
        epoch=_START.to(losses.device),
        values=values,
        names=_names(len(values)),
        noise=ROW_NOISE * torch.finfo(jacobian.dtype).eps / 2,
        lr=rule.learned_lr or LEARNED_LR,
        base_lr=LEARNED_LR,
        buffers=[buffers],
        gram=_gram_of,
        total=_total_of,
    )
    if rule.sees_absent:
        ctx.present = torch.arange(len(values), device=losses.device)
    if step and rule.observes:
        rule.observe(losses, ctx)
        _learn(rule, ctx)
    return ctx


def _recalled(
    rule: Rule, losses: Tensor, state: Mapping[str, Any] | None
) -> tuple[int, State, State]:
    """Return how many steps there were, the rule's tensors, and those for the parameters."""
    if state is None:
        return 0, state_like(rule, rule.learner or "adam", losses), {}
    if state.get("rule") != rule.kind:
        raise ValueError(
            f"aggregate: `state` belongs to the rule {state.get('rule')}, this one is {rule.kind}; "
            "pass None to start anew."
        )
    if state["tasks"] != losses.shape[0]:
        raise ValueError(
            f"aggregate: `state` belongs to {state['tasks']} tasks, the Jacobian has "
            f"{losses.shape[0]} rows; pass None to start anew."
        )
    tensors = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    return state["step"], tensors, dict(state["buffers"])


@cache
def _names(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def _learn(rule: Rule, ctx: Context) -> None:
    """Step what the rule learns."""
    for name, slope in ctx.slopes.items():
        advance(rule, ctx.state, name, slope, None, ctx.lr, rule.learner or "adam")
    ctx.slopes = {}


def _kept(rule: Rule, ctx: Context) -> dict[str, Any]:
    """Return what the next call needs."""
    _learn(rule, ctx)
    return {
        "rule": rule.kind,
        "tasks": ctx.losses.shape[0],
        "step": ctx.step + 1,
        "tensors": ctx.state,
        "buffers": ctx.buffers[0],
    }


def _probe(
    direction: Sequence[Tensor],
    lr: float | Tensor,
    closure: Callable[..., Any],
    weights: Tensor | None = None,
) -> Probed:
    """Ask the user's function for losses and gradients at other parameters."""
    losses, rows = closure(-lr * direction[0])
    rows = rows if weights is None else weights.to(rows) @ rows
    return Probed(losses.double(), [rows])


_gram_of, _total_of = partial(total_gram, host=True), partial(total_vector, host=True)
_START = torch.zeros((), dtype=torch.int64)  # no epoch ends here
CANCELLING = 30.0  # how much longer all weighted rows are than their sum, for sums in float64
TINY = 1e-20  # squared norms below which weights may be too large for the rows' dtype
_PLAIN = (torch.float32, torch.float64)


def check_arguments(
    jacobian: Tensor, rule: Rule, losses: Any, more: Sequence[object]
) -> tuple[Tensor, Tensor]:
    """Check the arguments; return Jacobian and losses, shape ``[m]``, float64, without graph."""
    if not isinstance(jacobian, Tensor) or not jacobian.is_floating_point():
        kind = jacobian.dtype if isinstance(jacobian, Tensor) else type(jacobian).__name__
        raise TypeError(f"aggregate: `jacobian` must be a floating-point tensor, got {kind}.")
    if jacobian.ndim != 2 or not jacobian.numel():
        raise ValueError(
            "aggregate: `jacobian` must have shape [m, n], one row per task, "
            f"got {list(jacobian.shape)}."
        )
    if more or rule.batches[0] > 1:
        checks.batches(
            "aggregate", rule, rule.batches, len(more) + 1, "`more` holds the further ones"
        )
    for rows in more:
        if isinstance(rows, Tensor) and rows.shape != jacobian.shape:
            raise ValueError(
                f"aggregate: every Jacobian in `more` must have shape {list(jacobian.shape)}, "
                f"got {list(rows.shape)}."
            )
    if losses is None:
        if rule.needs_losses:
            raise ValueError(
                f"aggregate: {type(rule).__name__} looks at the losses; pass `losses=`, one per "
                "row."
            )
        return jacobian.detach(), jacobian.new_ones(jacobian.shape[0], dtype=torch.float64)
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
    return jacobian.detach(), values.detach()


def host_gram(batches: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Return the inner products of all rows, on the host, and whether some row is tiny.

    Raises:
        ValueError: If an entry is not finite.
    """
    rows = batches[0] if len(batches) == 1 else torch.cat([*batches])
    gram = gram_matrix(rows).cpu()
    squares = gram.diagonal().tolist()
    if rows.dtype == torch.float64 and needs_scaling(squares):
        gram = gram_matrix(rows, scaled=True).cpu()
        squares = gram.diagonal().tolist()
    check_finite(squares)
    return gram, any(0 < square < TINY for square in squares)


def check_rows(jacobian: Tensor) -> None:
    """Raise ``ValueError`` naming the first row with an entry that is not finite."""
    total = jacobian.sum(dtype=WIDE[jacobian.dtype])  # one that is not finite shows in it
    if not math.isfinite(total.item()):
        check_finite(jacobian.abs().amax(dim=1).tolist())


def check_width(buffers: State, jacobian: Tensor) -> None:
    """Raise ``ValueError`` if what a rule kept belongs to other parameters."""
    for tensor in buffers.values():
        if tensor.shape[-1] != jacobian.shape[1]:
            raise ValueError(
                f"aggregate: `state` belongs to {tensor.shape[-1]} parameters, the Jacobian has "
                f"{jacobian.shape[1]} columns; pass None to start anew."
            )


def check_finite(numbers: Sequence[float]) -> None:
    """Raise ``ValueError`` naming the first number that is not finite."""
    for i, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(
                f"aggregate: row or loss {i} is not finite; every entry must be a number."
            )
