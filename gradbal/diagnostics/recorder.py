"""Keeping what steps leave behind, for those who look later."""

from collections.abc import Mapping
from math import nan
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from gradbal._utils import checks
from gradbal.diagnostics import files
from gradbal.diagnostics.course import Course, read
from gradbal.diagnostics.history import History
from gradbal.diagnostics.report import report
from gradbal.diagnostics.step import Step
from gradbal.optimizer import MTLOptimizer
from gradbal.step.record import StepRecord
from gradbal.step.trees import cloned


class Recorder:
    """Keep what the steps of an optimizer leave behind.

    Losses, weights, Gram matrices and what the rule reports are kept as they are: references to
    the few numbers that the step has made anyway, on the device where they are. Nothing is read
    back before you ask. Memory is bounded: the newest steps are kept, and an even sample of all.

    Attached until :meth:`detach` is called, or to the end of a ``with`` block. Checkpoints,
    copies and pickles of the optimizer do not contain it.

    Args:
        mtl_opt: The optimizer.
        capacity: Most steps to keep; half of them the newest, half spread over the training.
        every: Keep one step in so many.

    Raises:
        TypeError: If the optimizer is no ``MTLOptimizer``, or a number is none.
        ValueError: If a number is too small.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> mtl_opt = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad")
        >>> with Recorder(mtl_opt) as recorder:
        ...     mtl_opt.step(list(model(torch.ones(1, 2)).square().mean(dim=0)))
        >>> recorder.count
        1
    """

    def __init__(self, mtl_opt: MTLOptimizer, capacity: int = 1000, every: int = 1) -> None:
        if not isinstance(mtl_opt, MTLOptimizer):
            raise TypeError(f"Recorder: `mtl_opt` must be an MTLOptimizer, got {mtl_opt!r}.")
        checks.of_type(self, int, capacity=capacity, every=every)
        checks.at_least(self, 2, capacity=capacity)
        checks.at_least(self, 1, every=every)
        self.mtl_opt, self.every = mtl_opt, every
        self.history = History(capacity, every)
        self.count = 0
        self._skipped_before = -mtl_opt._flow.left_out
        self._newest, self._clock = mtl_opt.last, nan
        self._hook: Any = None
        self._attach()

    def _attach(self) -> None:
        if self._hook is None:
            self._hook = self.mtl_opt.register_step_post_hook(self._look)

    @property
    def skipped(self) -> int:
        """How many steps were left out, also by a ``GradScaler``."""
        return self._skipped_before + self.mtl_opt._flow.left_out

    @property
    def steps(self) -> list[Step]:
        """What is kept, oldest first: an even sample, and the newest in full."""
        return self.history.steps()

    def course(self, *, newest: bool = False) -> Course:
        """Read the numbers of an even sample of all steps, or of the newest ones."""
        return read([*(self.history.newest if newest else self.history.sample)])

    def report(self) -> str:
        """Say in words which tasks conflict, which dominates, and what the rule does about it."""
        return report(
            self.mtl_opt, self.course(), self.course(newest=True), self.count, self.skipped
        )

    def to_csv(self, path: str | Path) -> None:
        """Write a line for each step that is kept, with names as in ``MTLOptimizer.metrics``."""
        files.to_csv(self.steps, path)

    def to_jsonl(self, path: str | Path) -> None:
        """Write a JSON object for each step that is kept, with its Gram matrices in full."""
        files.to_jsonl(self.steps, path)

    def to_tensorboard(self, writer: Any) -> None:
        """Give each step that is kept to a writer.

        Args:
            writer: Has ``add_scalar(name, value, step)``, as ``SummaryWriter`` has.
        """
        files.to_tensorboard(self.steps, writer)

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept, as tensors and primitives only, for a checkpoint."""
        steps = [cloned({**s._asdict(), "record": vars(s.record)}) for s in self.steps]
        stride = self.history.stride
        return {"count": self.count, "skipped": self.skipped, "stride": stride, "steps": steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where another recorder was."""
        steps = [Step(**{**s, "record": StepRecord(**s["record"])}) for s in state_dict["steps"]]
        self.history.restore(steps, state_dict["stride"])
        self.count = state_dict["count"]
        self._skipped_before = state_dict["skipped"] - self.mtl_opt._flow.left_out

    def detach(self) -> None:
        """Record no more; what is kept stays."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> "Recorder":
        """Go on recording, also after an earlier block has ended."""
        self._attach()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def _look(self, mtl_opt: Any, args: object, kwargs: object) -> None:
        """Keep the step that has just ended, if one was taken with losses."""
        now = perf_counter()
        seconds, self._clock = now - self._clock, now
        record: StepRecord | None = mtl_opt.last
        if record is None or record is self._newest or record.skipped:
            return
        self._newest, number = record, self.count
        self.count += 1
        if number % self.every == 0:
            self.history.add(Step(number, seconds, self.skipped, record))
