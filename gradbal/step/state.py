"""Everything that a rule remembers: tasks, state, randomness and what is pending."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradbal._utils.checks import OWNER
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
    task_index,
)
from gradbal.step import checkpoint
from gradbal.step.accumulate import Pending
from gradbal.step.tasks import announced_tasks, known_tasks
from gradbal.step.trees import undoable

_CONTAINERS = ("state", "buffers", "slopes", "choice")  # written into; all others are replaced
_COUNTERS = ("solved", "age", "epoch")  # tensors with `capturable`

Path = tuple[str | int, ...]  # where a tensor lies in a core


class Core:
    """All mutable state of a rule, changed in place and never rebound on the optimizer.

    ``state_dict`` holds only numbers, strings and tensors, so it loads with
    ``torch.load(weights_only=True)``; by itself it can be saved with
    ``torch.distributed.checkpoint`` and loaded into a fresh optimizer.

    Attributes:
        rule: The rule, with its options.
        learner: How learned tensors are stepped, ``"adam"`` or ``"sgd"``.
        capturable: Whether a step may be captured in a graph and replayed. Then every tensor that
            lasts stays where it is and is written in place at the end of a step, and counters are
            0-dim tensors.
        good: With ``capturable``, whether the newest step is to be kept, 0-dim bool; None for yes.
        seed: Seed of all randomness.
        names: Names of all tasks ever seen.
        numbered: Whether the names are mere numbers, because the losses came as a list.
        sets: The tasks that ever reached each parameter, as a bit set.
        solved: Steps in which weights were solved; a 0-dim tensor with ``capturable``.
        skipped: Steps left out because something was not finite.
        age: Steps since the last solve, likewise.
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
        self,
        rule: Rule,
        *,
        tasks: int | Sequence[str] | None,
        learner: str,
        seed: int,
        capturable: bool = False,
    ) -> None:
        self.rule, self.seed = rule, seed
        self.learner = rule.learner or learner
        self.axes = task_axes(rule, self.learner)
        self.row_axes = row_axes(rule)
        self.names: list[str] = []
        self.numbered = False
        self.sets: dict[int, int] = {}
        self.capturable = capturable
        self.good: Tensor | None = None
        self.captured = False  # whether a graph reads and writes these tensors
        self.fixed: dict[Path, Tensor] = {}
        self.skipped = 0
        self.solved, self.age = self.count(0), self.count(0)
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
        self.announced = tasks is not None and not isinstance(tasks, int)
        if tasks is not None:
            self.numbered = isinstance(tasks, int)
            self._grow(announced_tasks(tasks))

    def count(self, number: int) -> Any:
        """Return a counter: a number, or with ``capturable`` a 0-dim tensor."""
        return torch.tensor(number) if self.capturable else number

    def number_tasks(self, names: Sequence[str] | None, count: int) -> list[int]:
        """Return the number of each task, and make room for new ones.

        Args:
            names: The tasks' names, or None for losses in a list.
            count: How many losses there are.

        Raises:
            ValueError: If a list has another length than before.
        """
        known = known_tasks(self.names, names, count, numbered=self.numbered)
        if self.announced and len(known) > len(self.names):
            raise ValueError(
                f"{OWNER}: expected losses of the tasks in `tasks=`, {', '.join(self.names)}, got "
                f"one of {known[len(self.names)]!r}; correct the name, or leave `tasks=` out."
            )
        if known != self.names:
            if self.captured and self.names:
                raise RuntimeError(
                    f"{OWNER}: task {known[len(self.names)]!r} is new, and a captured graph has no "
                    "room for it; name all tasks with `tasks=`, or capture after each was present."
                )
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
            self.fixed.update({("state", group, n): t for n, t in self.state[group].items()})
        self.state[group] = {name: t.to(device) for name, t in self.state[group].items()}
        self.epoch = self.epoch.to(device)
        if self.capturable:
            self.solved, self.age = self.solved.to(device), self.age.to(device)
            self._draw_on(device)
        some = self._seen(tasks)
        present = task_index(tasks, device) if self.rule.sees_absent else None
        return Context(
            losses=losses,
            present=present,
            state={n: part(t, self.axes[n], some) for n, t in self.state[group].items()},
            source=self.generator,
            step=self.solved,
            seed=self.seed,
            capturable=self.capturable,
            epoch=self.epoch,
            names=tuple(self.names[task] for task in tasks),
            **known,
        )

    def _draw_on(self, device: torch.device) -> None:
        """Go on drawing on another device: as before on one of the same type, else anew."""
        if self.generator.device != device:
            generator = torch.Generator(device).manual_seed(self.seed)
            if self.generator.device.type == device.type:
                generator.set_state(self.generator.get_state())
            self.generator = generator

    def buffers_for(self, grads: Mapping[int, Tensor], tasks: Sequence[int]) -> list[State]:
        """Show the rule what it keeps for these parameters, for the tasks at hand.

        Args:
            grads: Task gradients, by parameter, shape ``[m, *shape]``.
            tasks: Numbers of the tasks.
        """
        if not self.row_axes or not isinstance(self.rule, GradientRule):
            return []
        for number in grads.keys() - self.buffers.keys():
            new = self.rule.buffers(for_tasks(grads[number], len(self.names)))
            self.buffers[number] = new
            self.fixed.update({("buffers", number, name): t for name, t in new.items()})
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
        if new_names := ctx.state.keys() - state.keys():
            raise ValueError(
                f"{type(self.rule).__name__}: `ctx.state` holds {min(new_names)!r}, which `init` "
                "did not make; make every tensor that is kept there, so that it is saved and grows."
            )
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
            index = task_index(tasks, slope.device)
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
                    advance(
                        self.rule, self.state[group], name, slopes[name], moving, lr, self.learner
                    )
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

    @contextmanager
    def transaction(self) -> Iterator[Callable[[], None]]:
        """Undo every change if the body fails.

        In the body tensors are replaced and never written into, so only references are kept. With
        ``capturable`` the new ones are copied into the old at the end, see :meth:`_settle`, and the
        generator, which would have to be read from the device, goes on.

        Yields:
            A function that undoes every change made so far.
        """
        if not self.capturable:
            with undoable(self, _CONTAINERS, self.generator) as undo:
                yield undo
            return
        self.fixed = {path: kept[path[-1]] for path, kept in self._slots()}
        self.captured |= _capturing()
        self.good = None
        with undoable(self, _CONTAINERS, None) as undo:
            yield undo
            self._settle()

    def _slots(self) -> list[tuple[Path, Any]]:
        """Return the path of every tensor that lasts, and what holds it."""
        found: list[tuple[Path, Any]] = [((name,), self.__dict__) for name in _COUNTERS]
        for section in ("state", "buffers"):
            for key, kept in getattr(self, section).items():
                found += [((section, key, name), kept) for name in kept]
        held = [name for name, kept in self.held.items() if isinstance(kept, Tensor)]
        return found + [(("held", name), self.held) for name in held]

    def _settle(self) -> None:
        """Copy what has changed into the tensors that were there at the beginning.

        A graph reads and writes fixed addresses. Where the step was not :attr:`good`, what a rule
        keeps stays as it was.
        """
        if self.good is not None:
            for slopes in self.slopes.values():
                for name in filter(slopes.__contains__, self.rule.learned):
                    slopes[f"{name}.moving"] = slopes[f"{name}.moving"] * self.good
        old: list[Tensor] = []
        new: list[Tensor] = []
        for path, holder in self._slots():
            kept, tensor = self.fixed.get(path), holder[path[-1]]
            if kept is None or kept is tensor or not _alike(kept, tensor):
                continue
            if self.good is not None and path[0] not in ("age", "epoch"):
                tensor = torch.where(self.good, tensor, kept)
            else:
                tensor = tensor.clone()  # it may be another one that is written before it is read
            old.append(kept)
            new.append(tensor)
            holder[path[-1]] = kept
        if old:
            torch._foreach_copy_(old, new)

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
        checkpoint.check_tasks(self, state_dict)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one that fails leaves everything as it was.

        Raises:
            ValueError: If it does not fit, see :meth:`verify`.
        """
        self.verify(state_dict)
        with self.transaction():
            checkpoint.restore(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the parameters."""
        return {**self.__dict__, "shards": {}, "fixed": {}, "captured": False}


def _capturing() -> bool:
    """Say whether a CUDA graph is being captured."""
    there = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return there and torch.cuda.is_current_stream_capturing()


def _alike(a: Tensor, b: Tensor) -> bool:
    """Say whether one tensor can be copied into another without becoming another."""
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
