"""From what was found to weights: where the optimizer meets the rule."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gradbal._utils.devices import on_device
from gradbal.distributed import ALONE, Processes
from gradbal.graph.parameters import MODEL
from gradbal.rules._base import (
    Closure,
    Context,
    Direction,
    GradientRule,
    LossRule,
    Probed,
    Rule,
    WeightRule,
    Weights,
    no_probe,
)
from gradbal.rules._state import task_index
from gradbal.solvers.gram import by_batch, largest_entries, total_gram, total_vector
from gradbal.step.finite import Survey
from gradbal.step.record import StepRecord
from gradbal.step.state import Core

Rows = Callable[[str], Mapping[int, Tensor]]


@dataclass(frozen=True)
class Policy:
    """How weights are applied.

    Attributes:
        scale: ``"sum"`` brings mean-like rules to the length of the summed gradient.
        heads: ``"plain"``, ``"weighted"``, or None for the rule's own way.
        capturable: Whether nothing may be read back.
    """

    scale: str = "native"
    heads: str | None = None
    capturable: bool = False

    def factor(self, rule: Rule, n_tasks: int) -> int:
        """Return what the rule's weights are multiplied by."""
        return n_tasks if self.scale == "sum" and rule.scale == "mean" else 1

    def split(self, rule: Rule, result: Tensor | Weights) -> tuple[Tensor, Tensor | None]:
        """Return the weights on shared parameters, and those on heads or None for plain."""
        shared, heads = result if isinstance(result, Weights) else (result, None)
        factor = self.factor(rule, len(shared))
        shared = shared if factor == 1 else shared * factor
        if self.heads == "plain":
            return shared, None
        if heads is not None:
            return shared, heads
        return shared, shared if (self.heads or rule.heads) == "weighted" else None

    def split_direction(
        self,
        rule: Rule,
        result: Sequence[Tensor] | Direction,
        n_tasks: int,
        scale: Tensor | None,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return a direction brought to length, and the weights on heads or None for plain."""
        shared, heads = result if isinstance(result, Direction) else (result, None)
        factor = self.factor(rule, n_tasks)
        if scale is not None:
            shared = [part * (factor * scale) for part in shared]
        elif factor != 1:
            shared = [part * factor for part in shared]
        return shared, None if self.heads == "plain" else heads


@dataclass
class Part:
    """Some of the present tasks."""

    tasks: Sequence[int]
    positions: Sequence[int]
    device: torch.device

    def __post_init__(self) -> None:
        self.numbers = [self.tasks[i] for i in self.positions]
        self.whole = len(self.positions) == len(self.tasks)
        self.index = None if self.whole else task_index(self.positions, self.device)

    def pick(self, vector: Tensor) -> Tensor:
        return vector if self.index is None else vector[self.index]

    def pick_square(self, matrix: Tensor) -> Tensor:
        return matrix if self.index is None else matrix[..., self.index[:, None], self.index]

    def spread(self, vector: Tensor, default: float) -> Tensor:
        if self.index is None:
            return vector
        return vector.new_full((len(self.tasks),), default).index_copy(0, self.index, vector)


@dataclass
class Decision:
    """What a rule made of one batch.

    Attributes:
        shared: Weights on the shared parameters of each group, shape ``[m]``; zero for tasks
            that do not reach the group.
        heads: Weights on task-specific parameters, shape ``[m]``; None for plain gradients.
        direction: For elementwise rules the direction itself, by parameter.
        grams: The Gram matrix of each group, over the tasks that reach it.
        contexts: For each group the numbers of these tasks and the context to commit.
        parameters: For each group those whose gradients an elementwise rule has seen.
        reused: Whether the rule was not asked.
        due: With ``capturable`` and held weights, whether those of the rule are used, 0-dim; None
            for yes.
    """

    shared: dict[str, Tensor] = field(default_factory=dict)
    heads: Tensor | None = None
    direction: dict[int, Tensor] | None = None
    grams: dict[str, Tensor] = field(default_factory=dict)
    contexts: dict[str, tuple[list[int], Context]] = field(default_factory=dict)
    parameters: dict[str, list[int]] = field(default_factory=dict)
    reused: bool = False
    due: Tensor | None = None

    @property
    def in_one_pass(self) -> bool:
        """Whether one ordinary pass over the weighted losses gives all gradients."""
        return self.heads is not None and self.heads is self.shared.get(MODEL)

    def weigh(self, group: str, part: Part, shared: Tensor, heads: Tensor | None) -> None:
        """Take the weights of some of the tasks on a group and on their heads."""
        self.shared[group] = part.spread(shared, 0.0)
        if heads is shared and part.whole:
            self.heads = self.shared[group]
        else:
            self.weigh_heads(part, heads)

    def weigh_heads(self, part: Part, heads: Tensor | None) -> None:
        """Take the weights of some of the tasks on their heads, None for plain gradients."""
        if heads is not None:
            self.heads = part.spread(heads, 1.0)

    def point(self, rows: Mapping[int, Tensor], found: Sequence[Tensor]) -> None:
        """Take a direction, in the dtypes of the rows that it was made of."""
        pairs = zip(rows.items(), found, strict=True)
        new = {number: part.to(row.dtype) for (number, row), part in pairs}
        self.direction = {**(self.direction or {}), **new}

    def bad_weights(self) -> list[int]:
        """Return the positions of tasks whose weights, on any group or head, are NaN or inf."""
        vectors = [*self.shared.values()]
        if self.heads is not None and not self.in_one_pass:
            vectors.append(self.heads)
        numbers = [vector.tolist() for vector in vectors]
        return sorted({i for row in numbers for i, x in enumerate(row) if not math.isfinite(x)})

    def placed(self, device: torch.device) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the weights of every group, and those on heads, on a device in one copy."""
        found = [*self.shared.values()] + ([] if self.heads is None else [self.heads])
        if not found or found[0].device == device == found[-1].device:
            return self.shared, self.heads
        moved = list(on_device(torch.stack(found), device).unbind())
        shared = dict(zip(self.shared, moved, strict=False))
        return shared, None if self.heads is None else moved[-1]

    def all_finite(self, seen: Survey) -> Tensor:
        """Return whether losses, inner products and what the rule returned are finite, 0-dim."""
        diagonals = [gram.diagonal() for gram in seen.grams.values()]
        found = [seen.losses, *diagonals, *self.shared.values()]
        if self.direction is not None:
            found.append(largest_entries(list(self.direction.values()), seen.losses.device))
        return torch.cat([part.double() for part in found]).isfinite().all()

    def commit(self, core: Core) -> None:
        """Let the core keep what the rule has changed."""
        if self.reused:
            core.age = core.age + 1
            return
        for group, (tasks, ctx) in self.contexts.items():
            core.commit(group, tasks, ctx, self.parameters.get(group, ()))
        core.solved = core.solved + bool(self.contexts)
        if self.due is None or core.good is None:
            core.age = core.age * 0
        else:
            core.age = torch.where(self.due, core.age * ~core.good, core.age + 1)
            core.good = core.good & self.due

    def record(self, names: Sequence[str], seen: Survey) -> StepRecord:
        """Return what diagnostics will want to see."""
        losses, heads, weights = seen.losses, self.heads, list(self.shared.values())
        if seen.left_out:
            kept = [i for i in range(len(names)) if i not in seen.left_out]
            names = [names[i] for i in kept]
            losses, heads = losses[kept], None if heads is None else heads[kept]
            weights = [vector[kept] for vector in weights]
        several = torch.stack(weights) if len(weights) > 1 else None
        members = {
            group: [i for i, name in enumerate(names) if name in ctx.names]
            for group, (_, ctx) in self.contexts.items()
        }
        return StepRecord(
            tasks=tuple(names),
            losses=losses,
            weights=weights[0] if len(weights) == 1 else several,
            heads=heads,
            grams=self.grams,
            members=members,
            stats={group: dict(ctx.stats) for group, (_, ctx) in self.contexts.items()},
        )


@dataclass(frozen=True)
class Sight:
    """What a rule may look at beside Gram matrices and losses.

    Attributes:
        noise: Relative rounding error of the task gradients.
        rows: Gives the task gradients of a group, by parameter, for gradient rules.
        scale: Factor by which these were multiplied.
        n_batches: Number of batches whose task gradients are there.
        more: A closure, or None for task gradients, for each batch after the first.
        probe: Looks at the losses of a closure at other parameters, given the group's.
        lr: Learning rate of what the rule learns.
        base_lr: Learning rate of the model.
        shards: Parameters, by number, of which this process may hold a part only.
        processes: Which hold parts of the rows.
    """

    noise: float = 0.0
    rows: Rows | None = None
    scale: Tensor | None = None
    n_batches: int = 1
    more: Sequence[Closure | None] = ()
    probe: Callable[..., Probed] = no_probe
    lr: float | Tensor = 0.0
    base_lr: float | Tensor = 0.0
    shards: Mapping[int, Tensor] = field(default_factory=dict)
    processes: Processes = ALONE


def decide(
    core: Core,
    policy: Policy,
    tasks: Sequence[int],
    members: Mapping[str, Sequence[int]],
    seen: Survey,
    sight: Sight = Sight(),  # frozen
) -> Decision:
    """Ask the rule, once for each group.

    Args:
        core: The state; it changes only when the decision is committed.
        policy: How weights are applied.
        tasks: Numbers of the present tasks.
        members: For each group the positions of the tasks that reach it.
        seen: Gram matrices and losses.
        sight: What else the rule may look at.
    """
    rule, decision = core.rule, Decision()
    if not isinstance(rule, WeightRule | GradientRule):
        raise TypeError(f"{type(rule).__name__}: must be a LossRule, GramRule or GradientRule.")
    if isinstance(rule, LossRule):
        members = {MODEL: range(len(tasks))}
    for group, positions in members.items():
        part = Part(tasks, positions, seen.losses.device)
        ctx = core.context(
            group,
            part.numbers,
            part.pick(seen.losses),
            values=None if seen.values is None else [seen.values[i] for i in positions],
            noise=sight.noise,
            lr=sight.lr,
            base_lr=sight.base_lr,
            shards=sight.shards,
        )
        decision.contexts[group] = (part.numbers, ctx)
        if group in seen.grams:
            blocks = part.pick_square(by_batch(seen.grams[group], sight.n_batches))
            ctx.cross = blocks if sight.n_batches > 1 else None
            decision.grams[group] = blocks[0, 0]
        if isinstance(rule, GradientRule):
            stacks = sight.rows(group) if sight.rows else {}
            decision.parameters[group] = list(stacks)
            result = _ask(rule, part, stacks, core, ctx, sight)
        else:
            signal = ctx.losses if isinstance(rule, LossRule) else decision.grams[group]
            result = rule.weights(signal, ctx)
        if isinstance(result, Tensor | Weights):
            expected = torch.Size((len(positions),))
            shapes = [result.shape] if isinstance(result, Tensor) else [w.shape for w in result]
            if shapes.count(expected) < len(shapes):
                raise _wrong_shape(rule, len(positions), shapes)
            decision.weigh(group, part, *policy.split(rule, result))
        elif not isinstance(rule, GradientRule):
            raise TypeError(
                f"{type(rule).__name__}: `weights` must return a tensor of shape [m] or Weights, "
                f"got {type(result).__name__}."
            )
        else:
            found, heads = policy.split_direction(rule, result, len(positions), sight.scale)
            decision.point(stacks, found)
            decision.weigh_heads(part, heads)
    return decision


def _wrong_shape(rule: Rule, n_tasks: int, shapes: Sequence[torch.Size]) -> ValueError:
    """Return what to raise where a rule returned weights of another shape."""
    found = " and ".join(str(list(shape)) for shape in shapes)
    return ValueError(
        f"{type(rule).__name__}: expected one weight for each of the {n_tasks} tasks, shape "
        f"[{n_tasks}], got shape {found}; nothing was changed."
    )


def select(core: Core, decision: Decision, tasks: Sequence[int], update_every: int) -> Decision:
    """Choose on the device between new weights and held ones, for a step that may be replayed.

    A captured graph cannot leave the solve out, so it is done in every step.
    """
    decision.due = (core.age + 1 >= update_every) | (core.solved == 0)
    held = reuse(core, tasks)
    if held is not None and MODEL in decision.shared:
        in_one_pass = decision.in_one_pass
        shared = torch.where(decision.due, decision.shared[MODEL], held.shared[MODEL])
        decision.shared[MODEL] = shared
        if in_one_pass:
            decision.heads = shared
        elif decision.heads is not None and held.heads is not None:
            decision.heads = torch.where(decision.due, decision.heads, held.heads)
    return decision


def hold(core: Core, decision: Decision, tasks: Sequence[int]) -> None:
    """Remember the weights of a decision, for steps that reuse them."""
    if decision.reused or MODEL not in decision.shared:
        return
    shared = decision.shared[MODEL]
    index = task_index(tasks, shared.device)
    whole = shared.new_zeros(len(core.names))
    core.held = {
        "tasks": list(tasks),
        "shared": whole.index_copy(0, index, shared),
        "one pass": decision.in_one_pass,
    }
    if decision.heads is not None:
        core.held["heads"] = whole.index_copy(0, index, decision.heads)


def reuse(core: Core, tasks: Sequence[int]) -> Decision | None:
    """Return the held weights for these tasks, or None if they do not cover them all."""
    held = core.held
    if not held or not set(tasks) <= set(held["tasks"]):
        return None
    index = task_index(tasks, held["shared"].device)
    shared = held["shared"][index]
    heads = held["heads"][index] if "heads" in held else None
    return Decision({MODEL: shared}, shared if held["one pass"] else heads, reused=True)


def _ask(
    rule: GradientRule,
    part: Part,
    stacks: Mapping[int, Tensor],
    core: Core,
    ctx: Context,
    sight: Sight,
) -> Sequence[Tensor] | Direction | Tensor | Weights:
    """Ask a gradient rule, which must not see the factor on the gradients."""
    m = len(part.tasks)
    whole = [stack if sight.scale is None else stack / sight.scale for stack in stacks.values()]
    batches = [
        [part.pick(stack[m * b : m * b + m]) for stack in whole] for b in range(sight.n_batches)
    ]
    grads, further = batches[0], iter(batches[1:])
    ctx.more = [next(further) if closure is None else closure for closure in sight.more]
    host, numbers = not ctx.capturable, list(stacks)
    ctx.gram = partial(sight.processes.total, numbers, partial(total_gram, host=host))
    ctx.total = partial(sight.processes.total, numbers, partial(total_vector, host=host))
    ctx.probe = partial(sight.probe, list(stacks))
    ctx.buffers = core.buffers_for(dict(zip(stacks, grads, strict=True)), part.numbers)
    return rule.direction(grads, list(stacks), ctx)
