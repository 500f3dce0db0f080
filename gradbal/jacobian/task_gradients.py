"""The task gradients of one batch, whatever form they are kept in."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradbal.jacobian.dense import Keep
from gradbal.jacobian.head_passes import Heads
from gradbal.jacobian.representation import Represented
from gradbal.jacobian.streamed import GramOnly, Streamed

AnySink = Keep | Represented | Streamed


@dataclass
class TaskGradients:
    """The gradients of the present tasks, in whatever form the sink keeps them.

    Attributes:
        tasks: Numbers of the tasks.
        heads: Gradients of parameters that belong to one task.
        sink: Gradients of shared parameters.
        members: For each group the positions of the tasks that reach it.
        noise: Their relative rounding error.
        n_batches: Number of batches; the rows of further ones follow those of the first.
        seeds: Initial gradient of each loss, for rows that end at the cut.
    """

    tasks: list[int]
    heads: Heads
    sink: AnySink
    members: dict[str, list[int]]
    noise: float
    n_batches: int = 1
    seeds: Sequence[Tensor | None] = ()

    def grams(self, scaled: bool) -> dict[str, Tensor]:
        """Return the Gram matrix of each group, over all tasks of each batch in turn."""
        return {group: self.sink.gram(group, scaled=scaled) for group in self.members}

    @property
    def at_cut(self) -> bool:
        """Whether the trunk has not been gone through yet."""
        return isinstance(self.sink, GramOnly)

    @property
    def rows(self) -> Callable[[str], Mapping[int, Tensor]] | None:
        """What gives the rows of a group, for elementwise rules; None if they are gone."""
        return None if isinstance(self.sink, Streamed) else self.sink.stacks
