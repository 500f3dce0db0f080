"""The contract of a rule: what it looks at, what it keeps and what it promises."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from gradbal._utils.dtensor import part_of
from gradbal.solvers.gram import ROUNDING, ROW_NOISE, total_gram, total_vector

State = dict[str, Tensor]
Rows = list[Tensor]  # task gradients, one tensor of shape [m, *shape] per parameter
Closure = Callable[[], Any]  # evaluates losses anew
Scale = Literal["sum", "mean", "own"]
Heads = Literal["plain", "weighted", "own"]


class Claim(Enum):
    """What a rule may promise; the shared tests hold it to that on every awkward case."""

    NON_CONFLICTING = "no task's loss rises to first order: J d >= 0"
    EQUIVARIANT = "tasks in another order get the same weights in that order"
    HOMOGENEOUS = "c times the gradients gives c times the direction, c > 0"
    SCALE_FREE = "rescaling one task's gradient leaves the direction as it is"
    LINEAR = "linear under scaling: factors a + b on the gradients give the sum of a's and b's"
    SIMPLEX = "weights are non-negative and sum to 1"
    SUMS_TO_TASKS = "weights are non-negative and sum to the number of tasks"


class Weights(NamedTuple):
    """Weights that differ between the shared parameters and the heads, each of shape ``[m]``."""

    shared: Tensor
    heads: Tensor


class Direction(NamedTuple):
    """A direction found entry by entry, and weights of shape ``[m]`` for the heads."""

    shared: Sequence[Tensor]
    heads: Tensor


class Probed(NamedTuple):
    """Losses at other parameters, shape ``[k]``, and their gradients there."""

    losses: Tensor
    rows: Rows


def no_probe(*args: Any, **kwargs: Any) -> Probed:
    """Stand where there are no parameters to look at."""
    raise RuntimeError("There are no other parameters here at which losses could be looked at.")


@dataclass
class Context:
    """What a rule gets to see beside its signal; made anew for every solve.

    Attributes:
        losses: Losses of the present tasks, shape ``[m]``.
        state: The rule's tensors, restricted to the present tasks; a working copy that is
            kept only when the step succeeds, so a rule may change or rebind its entries.
        source: What :attr:`generator` gives; None for one that depends on seed and step alone.
        step: Solves done before this one; with ``capturable`` a 0-dim tensor on the device of the
            signal, so that a rule must not branch on it.
        seed: Seed of :meth:`uniform`.
        capturable: Whether nothing may be read back from the device.
        epoch: How often the user has called ``end_epoch``, 0-dim, on the device of the signal.
        names: Names of the present tasks.
        values: The losses as Python numbers, or None with ``capturable``.
        noise: Relative rounding error of a task gradient, from the narrowest dtype in the graph.
        stats: What a rule wants to be seen by diagnostics, such as a solver's residual: 0-dim, or
            one number per task.
        slopes: Gradients for the rule's ``learned`` tensors, by name.
        lr: Learning rate of the ``learned`` tensors, for rules that step them themselves.
        base_lr: Learning rate of the model.
        cross: Inner products between the task gradients of several batches, shape
            ``[b, b, m, m]``, that of the step first; None with one batch. For Gram rules.
        more: The further batches, for gradient rules: task gradients, or closures.
        buffers: The rule's tensors for each parameter, aligned with the gradients it gets; to be
            rebound and not written into.
        present: Positions of the present tasks in ``state`` and ``buffers`` for rules that see
            absent tasks.
        gram: Computes the Gram matrix of rows, summed over parameters, where rules solve.
        total: Sums vectors of shape ``[m]``, one per parameter, there.
        shards: Parameters, by index, of which this process may hold a part only.
        probe: ``probe(direction, lr, closure)`` evaluates a closure's losses at
            ``parameters - lr * direction`` and differentiates each, or with ``weights=``, shape
            ``[k, m]``, sums of them; everything is as before then.
    """

    losses: Tensor
    state: State
    source: torch.Generator | None = None
    step: int | Tensor = 0
    seed: int = 0
    capturable: bool = False
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    names: tuple[str, ...] = ()
    values: list[float] | None = None
    noise: float = ROW_NOISE * torch.finfo(torch.float64).eps / 2
    stats: dict[str, Any] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)
    lr: float | Tensor = 0.0
    base_lr: float | Tensor = 0.0
    cross: Tensor | None = None
    more: Sequence[Rows | Closure] = ()
    buffers: list[State] = field(default_factory=list)
    present: Tensor | None = None
    gram: Callable[[Sequence[Tensor]], Tensor] = total_gram
    total: Callable[[Sequence[Tensor]], Tensor] = total_vector
    shards: Mapping[int, Tensor] = field(default_factory=dict)
    probe: Callable[..., Probed] = no_probe

    @property
    def eps(self) -> float:
        """Part of a squared norm below which a Gram matrix holds nothing but rounding errors.

        Those of its own float64 sums, or the square of the task gradients' own: gradients that
        depend on each other have a cosine matrix whose smallest eigenvalue is about that large.
        """
        return max(ROUNDING, self.noise**2)

    @property
    def generator(self) -> torch.Generator:
        """The only source of randomness, on the CPU; with ``capturable`` on the signal's device."""
        if self.source is None:  # made when it is asked for: most rules never do
            self.source = torch.Generator().manual_seed(mix(self.seed, int(self.step)))
        return self.source

    def uniform(self, index: int, like: Tensor) -> Tensor:
        """Draw from U(0, 1), elementwise, for the parameter of this index.

        The draw depends on (seed, step, index) alone, so that engines, resumed runs and
        processes agree on it. With ``capturable`` it comes from the generator on the device.

        Args:
            index: Position of the parameter among those of the optimizer.
            like: Tensor whose shape and device the draw gets.

        Returns:
            Tensor of the shape of ``like``, float32 or wider.
        """
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.capturable:
            return torch.rand(like.shape, generator=self.generator, dtype=dtype, device=like.device)
        seed = mix(self.seed, int(self.step), index)
        generator = torch.Generator(like.device).manual_seed(seed)
        whole = self.shards.get(index, like)
        draw = torch.rand(whole.shape, generator=generator, dtype=dtype, device=like.device)
        return part_of(draw, whole).reshape(like.shape)


def mix(*numbers: int) -> int:
    """Hash integers to a 63-bit seed, well spread also for neighbouring arguments."""
    value = 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        value ^= value >> 31
    return value >> 1


class Rule:
    """What all rules have in common. Subclass one of the three kinds below instead.

    Attributes:
        scale: ``"sum"`` if the direction compares with the gradient of the summed loss,
            ``"mean"`` if with the mean's (``MTLOptimizer(scale="sum")`` then multiplies by the
            number of present tasks), ``"own"`` if the method sets a length of its own.
        heads: Whether task-specific parameters get the plain gradient of their own loss, that
            gradient times the task's weight, or times a weight that the rule names itself.
        needs_losses: Whether the rule looks at the losses.
        per_task: Names of options with one number per task; where given, they are found in
            ``ctx.state`` under the same name, restricted to the present tasks.
        learned: Names of the state tensors that are trained; the rule puts their gradients
            into ``ctx.slopes`` and the optimizer steps them.
        learner: How ``learned`` is stepped: ``"sgd"``, ``"adam"``, or by the rule's own
            :meth:`proximal`; None for SGD beside an SGD base, else Adam.
        learned_lr: Learning rate of the ``learned`` tensors; None for the base optimizer's.
        after: Where ``observe`` gets its losses: from a closure, from the next step's batch, or
            (``"auto"``) from a closure where one is given.
        batches: From how many independent batches the rule can take losses, that of the step
            among them.
        by_epochs: Whether the weights change only where the user marks the end of an epoch.
        weighted: Whether the direction is a weighted sum of the task gradients, of which the rule
            returns the weights.
        norms_only: Whether it looks at nothing of the gradients but their squared norms.
        probes: Whether it looks at the losses at other parameters. Then it gets the gradients of
            all parameters, with zeros for tasks that do not reach one, and its further batches
            may be closures.
        solver: ``"exact"``, or ``"cvxpy"`` for the slow reference on the host.
        sees_absent: Whether ``ctx.state`` and ``ctx.buffers`` hold absent tasks, too; the present
            ones are at ``ctx.present``.
    """

    scale: ClassVar[Scale] = "own"
    heads: ClassVar[Heads] = "plain"
    needs_losses: bool = False
    per_task: ClassVar[tuple[str, ...]] = ()
    learned: ClassVar[tuple[str, ...]] = ()
    learner: Literal["adam", "sgd", "proximal"] | None = None
    learned_lr: float | None = None
    after: str = "auto"
    batches: ClassVar[tuple[int, ...]] = (1,)
    sees_absent: ClassVar[bool] = False
    by_epochs: bool = False
    weighted: ClassVar[bool] = True
    norms_only: ClassVar[bool] = False
    probes: ClassVar[bool] = False
    solver: Any = "exact"

    def init(self, losses: Tensor) -> State:
        """Make every tensor that the rule keeps between steps, sized for ``losses``.

        Only shape, dtype and device of ``losses`` may be used: its values are not known when
        tasks are announced before the first step. Axes that grow with the number of tasks are
        found by comparing two sizes.
        """
        return {}

    def proximal(self, name: str, value: Tensor, slope: Tensor, lr: float | Tensor) -> Tensor:
        """Step a learned tensor in a way of the rule's own, for ``learner="proximal"``.

        Args:
            name: Which of ``learned``.
            value: The tensor.
            slope: What the rule put into ``ctx.slopes``.
            lr: The learning rate.

        Returns:
            The new tensor.
        """
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """What a checkpoint calls the rule; it fits rules of the same kind with other options."""
        return type(self).__name__

    @property
    def observes(self) -> bool:
        """Whether :meth:`observe` does anything."""
        return type(self).observe is not Rule.observe

    def observe(self, losses: Tensor, ctx: Context) -> None:
        """See the losses again after the step was taken; by default nothing is done."""


class WeightRule(Rule):
    """A rule whose direction is a weighted sum of the task gradients."""

    def weights(self, signal: Tensor, ctx: Context) -> Tensor | Weights:
        """Return the task weights, shape ``[m]``.

        Args:
            signal: Losses, shape ``[m]``, or the Gram matrix, shape ``[m, m]``.
            ctx: What else is known.
        """
        raise NotImplementedError


class LossRule(WeightRule):
    """A rule that looks at the losses alone and so costs nothing but one ordinary pass."""

    heads: ClassVar[Heads] = "weighted"
    norms_only: ClassVar[bool] = True  # and not even at these
    needs_losses = True


class GramRule(WeightRule):
    """A rule that looks at the inner products of the task gradients."""


class GradientRule(Rule):
    """A rule that looks at the task gradients entry by entry."""

    weighted: ClassVar[bool] = False

    def buffers(self, rows: Tensor) -> State:
        """Make every tensor that the rule keeps for one parameter between steps.

        Args:
            rows: The task gradients, shape ``[m, *shape]``; only shape, dtype and device may be
                used. Axis 0 of a tensor runs over tasks if its size changes with ``m``.
        """
        return {}

    def direction(
        self, grads: Sequence[Tensor], indices: Sequence[int], ctx: Context
    ) -> Sequence[Tensor] | Direction | Tensor | Weights:
        """Combine the task gradients, parameter by parameter.

        Args:
            grads: Task gradients, one tensor of shape ``[m, *shape]`` per parameter.
            indices: Position of each of these parameters among those of the optimizer.
            ctx: What else is known.

        Returns:
            The direction, one tensor of shape ``[*shape]`` per parameter, with weights for the
            heads if these are not plain; or task weights, shape ``[m]``, if ``weighted``.
        """
        raise NotImplementedError
