"""Everything that a rule remembers: tasks, state, randomness and what is pending."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from gradbal.rules._base import Context, GradientRule, Rule, State
from gradbal.rules._learned import advance
from gradbal.rules._state import (
    for_tasks,
    grown,
    grown_rows,
    merged,
    new_state,
    part,
    per_task_numbers,
    per_task_options,
    row_axes,
    some_rows,
    task_axes,
)
from gradbal.step import checkpoint
from gradbal.step.accumulate import Pending
from gradbal.step.tasks import announced_tasks, known_tasks
from gradbal.step.trees import undoable

_CONTAINERS = ("state", "buffers", "slopes", "choice")  # written into; all others are replaced


class Core:
    """All mutable state of a rule, changed in place and never rebound on the optimizer.

    ``state_dict`` holds only numbers, strings and tensors, so it loads with
    ``torch.load(weights_only=True)``; by itself it can be saved with
    ``torch.distributed.checkpoint`` and loaded into a fresh optimizer.

    Attributes:
        rule: The rule, with its options.
        learner: How learned tensors are stepped, ``"adam"`` or ``"sgd"``.
        seed: Seed of all randomness.
        names: Names of all tasks ever seen.
        numbered: Whether the names are mere numbers, because the losses came as a list.
        sets: The tasks that ever reached each parameter, as a bit set.
        solved: Steps in which weights were solved.
        skipped: Steps left out because something was not finite.
        age: Steps since the last solve.
        epoch: How often the user marked the end of an epoch, 0-dim.
        generator: The only source of randomness.
        state: The rule's tensors, by group and name.
        buffers: The rule's tensors for each parameter, by parameter and name.
        held: Weights of the last solve, for steps that reuse them.
        slopes: Gradients of learned tensors that the next step will apply.
        decided: Tasks of the last solve, until the step that uses it.
        awaiting: Tasks whose losses after the step the rule waits for.
        pending: What waits for the rest of a batch.
        choice: What an engine has settled on.
        shards: Parameters of which this process may hold a part only, by number.
        n_processes: How many processes have put a part of what is pending aside.
    """

    def __init__(
        self, rule: Rule, *, tasks: int | Sequence[str] | None, learner: str, seed: int
    ) -> None:
        self.rule, self.seed = rule, seed
        self.learner = rule.learner or learner
        self.axes = task_axes(rule, self.learner)
        self.row_axes = row_axes(rule)
        self.names: list[str] = []
        self.numbered = False
        self.sets: dict[int, int] = {}
        self.solved = self.skipped = self.age = 0
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, State] = {}
        self.buffers: dict[int, State] = {}
        self.held: dict[str, Any] = {}
        self.slopes: dict[str, State] = {}
        self.decided: set[int] = set()
        self.awaiting: set[int] = set()
        self.pending = Pending()
        self.choice: Mapping[str, Mapping[str, str]] = {}
        self.shards: Mapping[int, Tensor] = {}
        self.n_processes = 1
        if tasks is not None:
            self.numbered = isinstance(tasks, int)
            self._grow(announced_tasks(tasks))

    def number_tasks(self, names: Sequence[str] | None, count: int) -> list[int]:
        """Return the number of each task, and make room for new ones.

        Args:
            names: The tasks' names, or None for losses in a list.
            count: How many losses there are.

        Raises:
            ValueError: If a list has another length than before.
        """
        known = known_tasks(self.names, names, count, numbered=self.numbered)
        if known != self.names:
            self.numbered = names is None
            self._grow(known)
        return list(range(count)) if names is None else [known.index(name) for name in names]

    def _grow(self, names: list[str]) -> None:
        """Extend every tensor of every group to the new number of tasks."""
        per_task_options(self.rule, len(names))
        for group, state in self.state.items():
            device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
            self.state[group] = grown(state, self._new_state(len(names), device))
        self.buffers = {
            n: grown_rows(b, self.row_axes, len(names)) for n, b in self.buffers.items()
        }
        self.held = {}
        self.names = names

    def _new_state(self, n_tasks: int, device: torch.device) -> State:
        return new_state(self.rule, self.learner, n_tasks, device)

    def context(self, group: str, tasks: Sequence[int], losses: Tensor, **known: Any) -> Context:
        """Show the rule its working copy of the state, for the tasks at hand.

        Args:
            group: Name of the group.
            tasks: Numbers of the tasks.
            losses: Their losses, shape ``[m]``, on the device where the rule works.
            **known: Further attributes of the context.
        """
        device = losses.device
        if group not in self.state:
            self.state[group] = self._new_state(len(self.names), device)
        self.state[group] = {name: t.to(device) for name, t in self.state[group].items()}
        self.epoch = self.epoch.to(device)
        if known.get("capturable") and self.generator.device.type != device.type:
            self.generator = torch.Generator(device).manual_seed(self.seed)
        some = self._seen(tasks)
        present = torch.tensor(tasks, device=device) if self.rule.sees_absent else None
        return Context(
            losses=losses,
            present=present,
            state={n: part(t, self.axes[n], some) for n, t in self.state[group].items()},
            source=self.generator,
            step=self.solved,
            seed=self.seed,
            epoch=self.epoch,
            names=tuple(self.names[task] for task in tasks),
            **known,
        )

    def buffers_for(self, grads: Mapping[int, Tensor], tasks: Sequence[int]) -> list[State]:
        """Show the rule what it keeps for these parameters, for the tasks at hand.

        Args:
            grads: Task gradients, by parameter, shape ``[m, *shape]``.
            tasks: Numbers of the tasks.
        """
        if not self.row_axes or not isinstance(self.rule, GradientRule):
            return []
        for number in grads.keys() - self.buffers.keys():
            self.buffers[number] = self.rule.buffers(for_tasks(grads[number], len(self.names)))
        some = self._seen(tasks)
        return [
            {name: some_rows(t, self.row_axes[name], some) for name, t in self.buffers[n].items()}
            for n in grads
        ]

    def commit(
        self, group: str, tasks: Sequence[int], ctx: Context, parameters: Sequence[int] = ()
    ) -> None:
        """Keep what a rule has changed, and the gradients of what it learns."""
        state, some = self.state[group], self._seen(tasks)
        for number, rows in zip(parameters, ctx.buffers, strict=False):
            kept = self.buffers[number]
            self.buffers[number] = {
                name: merged(old, rows[name], self.row_axes[name], some)
                for name, old in kept.items()
            }
        for name, new in ctx.state.items():
            state[name] = merged(state[name], new, self.axes[name], some)
        for name, slope in ctx.slopes.items():
            slopes = self.slopes.setdefault(group, {})
            moving = f"{name}.moving"
            if list(tasks) == list(range(len(self.names))):
                slopes[name] = slopes[name] + slope if name in slopes else slope
                slopes[moving] = torch.ones_like(slope)
                continue
            none = torch.zeros_like(state[name])
            index = torch.tensor(tasks, device=slope.device)
            slopes[name] = slopes.get(name, none).index_add(0, index, slope)
            slopes[moving] = slopes.get(moving, none).index_fill(0, index, 1)

    def renew(self, option: str, values: Mapping[str, float] | Sequence[float]) -> None:
        """Give an option with one number per task new values.

        Args:
            option: Its name.
            values: By task, or in the order of the tasks.

        Raises:
            ValueError: If the rule has no such option, or there is not one number for each task.
            RuntimeError: If there was no step yet.
        """
        numbers = per_task_numbers(self.rule, option, values, self.names)
        if not self.state:
            raise RuntimeError(
                f"{type(self.rule).__name__}: `{option}` can be given anew after the first step; "
                "before, pass it to the rule."
            )
        for group, state in self.state.items():
            like = next(iter(state.values()), torch.zeros((), dtype=torch.float64))
            new = torch.tensor(numbers, dtype=torch.float64, device=like.device)
            self.state[group] = {**state, option: new}

    def observe(self, tasks: Sequence[int], losses: Tensor) -> None:
        """Show the rule the losses after a step."""
        for group in list(self.state):
            ctx = self.context(group, tasks, losses)
            self.rule.observe(losses, ctx)
            self.commit(group, tasks, ctx)

    def learn(self, lr: float | Tensor) -> None:
        """Step what the rule learns with the gradients gathered since the last step."""
        for group, slopes in self.slopes.items():
            for name in self.rule.learned:
                if name in slopes:
                    moving = slopes[f"{name}.moving"] > 0
                    advance(self.state[group], name, slopes[name], moving, lr, self.learner)
        self.slopes = {}

    def forget_step(self) -> None:
        """Forget what waits for a step that will not come."""
        self.slopes, self.decided = {}, set()

    def _seen(self, tasks: Sequence[int]) -> Sequence[int] | None:
        """Return these tasks if the rule sees a part of its tensors, None if it sees them whole."""
        if self.rule.sees_absent:
            return None
        return None if list(tasks) == list(range(len(self.names))) else tasks

    def discard(self) -> None:
        """Forget what is pending."""
        self.pending = Pending()

    def renumber(self, moved: Mapping[int, int]) -> None:
        """Follow parameters that have another number now, and forget those that have none."""
        self.sets = {moved[n]: kept for n, kept in self.sets.items() if n in moved}
        self.buffers = {moved[n]: kept for n, kept in self.buffers.items() if n in moved}
        self.pending = self.pending.renumbered(moved)

    def transaction(self, *, random: bool = True) -> AbstractContextManager[Callable[[], None]]:
        """Undo every change if the body fails.

        Tensors are replaced and never written into, so only references are kept.

        Args:
            random: Put the generator back, too, which reads it from the device.

        Returns:
            A context that gives a function that undoes every change made so far.
        """
        return undoable(self, _CONTAINERS, self.generator if random else None)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on as if nothing had happened.

        What is kept for sharded parameters is gathered, so that it can be loaded by any number of
        processes; then all of them must call this.

        Raises:
            RuntimeError: If gradients were put aside in several processes.
        """
        return checkpoint.sealed(self.contents())

    def contents(self) -> dict[str, Any]:
        """Return what ``state_dict`` does, with the sections open; it loads just as well."""
        return checkpoint.contents(self)

    def verify(self, state_dict: Mapping[str, Any]) -> None:
        """Say whether a checkpoint fits, without changing anything.

        Raises:
            ValueError: If it was written by a newer version or for another rule.
        """
        checkpoint.verify(state_dict, self.rule.kind)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it does not fit, see :meth:`verify`.
        """
        self.verify(state_dict)
        checkpoint.restore(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the parameters."""
        return {**self.__dict__, "shards": {}}
