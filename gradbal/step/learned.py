"""What a rule learns: stepped after the model, or from the losses after the step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal.distributed import Processes
from gradbal.rules._state import task_index
from gradbal.step.closures import losses_after
from gradbal.step.state import Core


class Learning:
    """Step what a rule learns, and show it the losses again where it asks for them.

    Args:
        core: The rule's state.
        base: Whose learning rate is taken where neither user nor rule gives one.
        lr: The user's learning rate.
        tell_once: Puts a line into the log.
    """

    def __init__(
        self,
        core: Core,
        base: torch.optim.Optimizer,
        lr: float | None,
        tell_once: Callable[[str, str], None],
    ) -> None:
        self.core, self.base, self.given, self.tell_once = core, base, lr, tell_once

    @property
    def lr(self) -> float | Tensor:
        """The learning rate of what is learned."""
        lr = self.core.rule.learned_lr if self.given is None else self.given
        return self.base_lr if lr is None else lr

    @property
    def base_lr(self) -> float | Tensor:
        """The learning rate of the first parameter group."""
        lr: float | Tensor = self.base.param_groups[0]["lr"]
        return lr

    @torch.no_grad()
    def after_step(self, closure: Callable[[], Any] | None, processes: Processes) -> None:
        """Do what follows a step of the model.

        Args:
            closure: Evaluates the losses again, if there is one that does.
            processes: Each with its part of the batch.
        """
        if self.core.slopes or self.core.decided:
            with self.core.transaction():
                self._after_step(closure, processes)

    def _after_step(self, closure: Callable[[], Any] | None, processes: Processes) -> None:
        core = self.core
        core.learn(self.lr)
        if not core.decided:
            return
        core.awaiting, core.decided = set(core.decided), set()
        if closure is not None and core.rule.after != "next":
            with processes.telling(core):
                names, losses = losses_after(closure)
                tasks = core.number_tasks(names, len(losses))
            values = torch.stack([loss.reshape(()) for loss in losses]).double()
            values = values if core.capturable else values.cpu()  # where the rule works
            self.show(*processes.joined(core, tasks, values))
        else:
            self.tell_once(
                "next",
                f"{type(core.rule).__name__} looks at the losses after the step; without a "
                "closure it takes those of the next step, which belong to another batch.",
            )

    def show(self, tasks: Sequence[int], losses: Tensor) -> None:
        """Show the rule these losses, if it waits for them."""
        core = self.core
        here = [i for i, task in enumerate(tasks) if task in core.awaiting]
        if here:
            core.awaiting = set()
            core.observe([tasks[i] for i in here], losses[task_index(here, losses.device)])
            core.learn(self.lr)
