"""What several processes that each have a part of the batch must agree on, and average."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

from torch import Tensor

from gradbal._utils.dtensor import Holding
from gradbal.distributed.counts import Counts, read_counts
from gradbal.distributed.layout import Columns, RowStorage
from gradbal.distributed.row_averages import NoExchange
from gradbal.graph.heads_and_trunk import Plan
from gradbal.graph.losses import Batch, Losses, named_losses, read_batch

Known = Mapping[int, int]
MakePlans = Callable[[Known], list[Plan]]
Key = tuple[int, int]  # what it belongs to, the number of its parameter


class Names(Protocol):
    """What knows the tasks: the core."""

    names: list[str]

    def number_tasks(self, names: Sequence[str] | None, count: int) -> list[int]:
        """Return the number of each task, and make room for new ones."""


class Settled(NamedTuple):
    """What was found here, averaged; and what was found anywhere."""

    grads: dict[Key, Tensor]
    marks: set[Key]


class Processes:
    """One process alone: nothing is to be agreed on.

    Attributes:
        size: How many there are.
        even: Whether all have losses of the same tasks.
    """

    size, even = 1, True

    def join(self, params: Sequence[Tensor]) -> None:
        """Take note of the parameters.

        Raises:
            RuntimeError: If they are no replicas and no shards.
        """

    def holding(self, number: int) -> Holding:
        """Say how a parameter is spread."""
        return Holding()

    def columns(self, n: int, holding: Holding) -> Columns:
        """Say how so many columns of parameters that are spread so are spread."""
        return Columns(n)

    def rows(self, blocks: Sequence[RowStorage], n_tasks: int) -> NoExchange:
        """Return what exchanges the rows of task gradients in these blocks."""
        return NoExchange()

    def meet(
        self,
        core: Names,
        losses: Losses,
        counts: Counts | None,
        point: Callable[[], str],
        aux: Batch | None,
    ) -> Batch:
        """Read the losses, and learn which tasks there are in all processes.

        Args:
            core: Knows the tasks.
            losses: As the user gave them.
            counts: Samples behind each loss in this process; None for equally many.
            point: Says where in the training this process is; must be the same everywhere.
            aux: Auxiliary losses.

        Returns:
            The losses of all tasks that are present anywhere, with this process' shares.

        Raises:
            TypeError: If the losses or counts are of the wrong kind.
            ValueError: If a loss is no scalar, or a count cannot be.
            RuntimeError: If it fails in another process.
        """
        names, found = named_losses(losses)
        numbers = core.number_tasks(names, len(found))
        read_counts(counts, names, numbers)
        return read_batch(found, numbers)

    def plan(self, make: MakePlans, known: Known) -> list[Plan]:
        """Make plans in which everything counts that any process reaches.

        Args:
            make: Makes plans for the losses of this process, given the tasks that ever reached
                each parameter.
            known: These tasks, as far as they are known.
        """
        return make(known)

    def first(self, number: int) -> int:
        """Return the number that the first process gives."""
        return number

    def beside(self, aux: Batch | None) -> Tensor | None:
        """Return what there is of auxiliary losses, of one length in all processes."""
        return None if aux is None else aux.values

    def sum(self, vector: Tensor) -> Tensor:
        """Return the sum of everybody's numbers; for few."""
        return vector

    def all(self, good: bool) -> bool:
        """Say whether something is so in all processes."""
        return good

    def total(
        self, numbers: Sequence[int], part: Callable[..., Tensor], rows: Sequence[Tensor]
    ) -> Tensor:
        """Return a sum over parameters of which processes may hold parts.

        Args:
            numbers: The parameters.
            part: Computes the sum over some of them.
            rows: What it is computed from, one tensor per parameter.
        """
        return part(rows)

    def where(self, bad: bool) -> str:
        """Say in which processes something is so, in brackets; nothing for one alone."""
        return ""

    def compare(self, things: Mapping[str, Tensor | str]) -> None:
        """Verify that all processes have the same.

        Args:
            things: What, by name; of sharded tensors the part that this process holds is left out.

        Raises:
            RuntimeError: If one differs, with its name.
        """

    def settle(self, grads: Mapping[Key, Tensor], marks: Collection[Key]) -> Settled:
        """Average gradients over the processes; where one has none it counts as zero.

        Args:
            grads: By what they belong to and their parameter.
            marks: Anything else that counts if it is so in one process.
        """
        return Settled({**grads}, {*marks})

    def same(self, text: str) -> bool:
        """Say whether all processes give the same text."""
        return True

    def average(self, grads: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Average gradients by parameter, likewise."""
        found = self.settle({(0, n): grad for n, grad in grads.items()}, ()).grads
        return {n: grad for (_, n), grad in found.items()}

    def watch(self) -> AbstractContextManager[None]:
        """Notice what others (DDP) do to the gradients of an ordinary backward pass."""
        return nullcontext()

    def complete(self) -> None:
        """Average the gradients of that pass that nobody else has averaged."""

    def leave_word(self, error: BaseException) -> None:
        """Tell those who will wait in vain why this process goes no further."""

    def telling(self, core: Names) -> AbstractContextManager[None]:
        """Tell the others, who wait for this process' losses, if there will be none."""
        return nullcontext()

    def joined(self, core: Names, tasks: list[int], values: Tensor) -> tuple[list[int], Tensor]:
        """Return tasks and losses of the whole batch, evaluated again after a step.

        Args:
            core: Knows the tasks.
            tasks: Numbers of the tasks in this process.
            values: Their losses, float64.
        """
        return tasks, values


def shared_out(total: Tensor, copies: int) -> Tensor:
    """Return one of so many equal shares."""
    return total if copies == 1 else total / copies


ALONE = Processes()
