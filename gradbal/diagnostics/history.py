"""A long training in little memory."""

from collections import deque
from collections.abc import Iterable

from gradbal.diagnostics.step import Step


class History:
    """The newest steps, all of them, and an even sample of the whole training.

    Args:
        capacity: Most steps to keep; half of them for each.
        stride: Distance of the steps that come.

    Attributes:
        newest: The newest steps.
        sample: Those whose number is a multiple of the stride.
        stride: Distance of steps in the sample; doubled whenever it is full.
    """

    def __init__(self, capacity: int, stride: int) -> None:
        self.newest: deque[Step] = deque(maxlen=capacity // 2)
        self.sample: list[Step] = []
        self.stride, self.room = stride, capacity - capacity // 2

    def add(self, step: Step) -> None:
        """Keep a step, the newest of all."""
        self.newest.append(step)
        self._keep(step)
        if len(self.sample) > self.room:
            self.stride *= 2
            old, self.sample = self.sample, []
            for one in old:
                self._keep(one)

    def steps(self) -> list[Step]:
        """Return all that is kept, oldest first."""
        first = self.newest[0].number if self.newest else 0
        return [*(step for step in self.sample if step.number < first), *self.newest]

    def restore(self, steps: Iterable[Step], stride: int) -> None:
        """Keep what another history has kept."""
        self.newest.clear()
        self.sample, self.stride = [], stride
        for step in steps:
            self.add(step)

    def _keep(self, step: Step) -> None:
        if step.number % self.stride == 0:
            self.sample.append(step)
