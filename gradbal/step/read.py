"""What comes in: losses of this process, and which processes there are."""

from functools import partial

import torch
from torch import Tensor

from gradbal._utils.checks import OWNER
from gradbal.distributed import ALONE, Processes, connect
from gradbal.graph.losses import Batch, Losses
from gradbal.jacobian.compute import Descent
from gradbal.jacobian.engines import Representation
from gradbal.rules._base import Closure, GradientRule, mix
from gradbal.step.call import Call
from gradbal.step.options import Options
from gradbal.step.state import Core


class Reader:
    """Read losses, together with the other processes that have a part of the batch.

    Args:
        core: Knows the tasks.
        options: The user's options.
        descent: Knows the parameters, and works with the processes that are found.
    """

    def __init__(self, core: Core, options: Options, descent: Descent) -> None:
        self.core, self.options, self.descent = core, options, descent
        core.shards = self._shards

    @property
    def processes(self) -> Processes:
        """Those that balance their losses together."""
        return self.descent.processes

    def connect(self) -> Processes:
        """Return the processes that balance their losses together, found anew if that changed.

        Raises:
            RuntimeError: If their parameters are no replicas.
            ValueError: If they cannot do together what the options ask for.
        """
        self._refresh()
        rule = self.core.rule
        whole = isinstance(rule, GradientRule)
        found = connect(self.options.process_group, self.processes, whole=whole)
        if found is not self.processes:
            self._check_together()
            self.descent.meet(found)
        found.join(self.descent.params)
        return found

    def read(self, losses: Losses, call: Call | None = None) -> Batch:
        """Bring the losses into one form and give each task its number.

        Args:
            losses: Those of this process.
            call: The arguments of the call; None to leave other processes out of it.
        """
        core = self.core
        if not core.capturable:  # else no engine draws
            self.descent.planner.seed = mix(core.seed, core.solved)
        if call is None:
            self._refresh()
            batch = ALONE.meet(core, losses, None, str, None)
        else:
            point, aux = partial(self._point, call), call.aux_batch
            batch = self.connect().meet(core, losses, call.counts, point, aux)
            core.n_processes = self.processes.size
        self.descent.planner.names = core.names
        if not batch.tasks:
            raise ValueError(
                "Losses: no loss has a graph, so there is nothing to differentiate; compute at "
                "least one from parameters that require gradients."
            )
        return batch

    def further(self, batch: Batch, call: Call) -> list[Batch | Closure]:
        """Bring further batches into form; closures stay for rules that look ahead."""
        core, processes, found = self.core, self.processes, list[Batch | Closure]()
        if not call.more and max(core.rule.batches) > 1:
            self.descent.planner.log.tell_once(
                "one batch",
                f"{type(core.rule).__name__} can compare independent batches and got one, which "
                "biases its weights; pass their losses as `step(losses, second)` or "
                "`step(losses, second, third)`.",
            )
        for more in call.more:
            if callable(more) and core.rule.probes:
                found.append(more)
                continue
            with torch.enable_grad(), processes.telling(core):
                losses = more() if callable(more) else more
            even = processes.even
            other = processes.meet(core, losses, call.counts, partial(self._point, call), None)
            processes.even = processes.even and even
            found.append(other)
            if other.tasks != batch.tasks:
                raise ValueError(
                    f"{OWNER}: every batch must have losses of the same tasks, got those of "
                    f"{[core.names[task] for task in other.tasks]} beside "
                    f"{[core.names[task] for task in batch.tasks]}; leave the task out everywhere."
                )
        return found

    def prove_alike(self) -> None:
        """Verify that all processes have the same parameters and rule state.

        Raises:
            RuntimeError: If one differs.
        """
        processes, core = self.connect(), self.core
        roles = self.descent.roles
        things: dict[str, Tensor | str] = {
            f"parameter {n}": param for n, param in enumerate(roles.params) if n not in roles.shards
        }
        things["the list of tasks"] = repr(core.names)
        things["the number of steps"] = repr((int(core.solved), core.skipped, int(core.age)))
        things["the random generator"] = core.generator.get_state()
        for group, state in core.state.items():
            things |= {f"{name!r} of the rule ({group})": kept for name, kept in state.items()}
        processes.compare(things)

    def _refresh(self) -> None:
        """Follow parameters that joined, left or were replaced."""
        moved = self.descent.refresh()
        if moved is not None:
            self.core.renumber(moved)
            self.core.shards = self._shards

    @property
    def _shards(self) -> dict[int, Tensor]:
        """The parameters of which this process may hold a part only, by number."""
        return {n: self.descent.params[n] for n in self.descent.roles.shards}

    def _point(self, call: Call) -> str:
        """Say where in the training this process is."""
        kind = "puts gradients aside" if call.accumulate else "balances losses"
        pending = " after others" if self.core.pending else ""
        return f"{kind}{pending} after {self.core.solved} solved steps"

    def _check_together(self) -> None:
        """Raise if several processes cannot balance their losses together."""
        rule, name = self.core.rule, type(self.core.rule).__name__
        engine = self.descent.planner.engine
        if isinstance(rule, GradientRule) and isinstance(engine, Representation):
            raise ValueError(
                f"{OWNER}: {name} looks at single entries, and at a representation every process "
                "has entries of its own; choose another engine, such as Sequential."
            )
        if self.options.capturable:
            raise ValueError(
                f"{OWNER}: with several processes numbers must be read back to agree on, so "
                "`capturable` cannot be; leave it out."
            )
        if rule.probes:
            raise ValueError(
                f"{OWNER}: {name} looks at the losses at other parameters, which several processes "
                "cannot do together; choose another rule."
            )
