"""Rows that meet and are not kept: one pass goes down from the cut once weights are known."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradbal.graph.parameters import MODEL
from gradbal.jacobian.dense import Keep
from gradbal.jacobian.pull import Cotangent, Rows, RowStream
from gradbal.jacobian.sparse import summed, weighted
from gradbal.solvers.gram import needs_scaling


@dataclass
class GramOnly:
    """Keep the tasks' cotangents at the cut.

    Attributes:
        n_tasks: How many tasks there are.
        n_edges: How many edges the cut has; their cotangents come first.
        first: Number of the first edge, after those of all parameters.
        held: The cotangents of each task.
    """

    n_tasks: int
    n_edges: int
    first: int
    held: list[Sequence[Tensor | None]] = field(default_factory=list, kw_only=True)

    def holding(self, cotangents: Iterable[Cotangent]) -> Iterator[Cotangent]:
        """Keep cotangents as they go by."""
        for cotangent in cotangents:
            self.held.append(cotangent.values)
            yield cotangent

    def drop(self, tasks: Collection[int]) -> None:
        """Forget the cotangents of some tasks."""
        for task in tasks:
            self.held[task] = [None] * len(self.held[task])

    def direction(self, weights: Tensor) -> dict[int, Tensor]:
        """Return the weighted sum of the cotangents at each edge of the cut, numbered on."""
        sums = {self.first + i: weighted(col, weights) for i, col in enumerate(self._columns())}
        return {number: total for number, total in sums.items() if total is not None}

    def _columns(self) -> list[tuple[Tensor | None, ...]]:
        """Return the cotangents of each edge of the cut, one per task."""
        return list(zip(*(values[: self.n_edges] for values in self.held), strict=True))


@dataclass
class Streamed(GramOnly):
    """Let the rows of one piece of the trunk after the other meet, and keep none.

    Attributes:
        params: All parameters of the optimizer.
        beside: Keeps the rows of shared parameters beside the trunk.
        piece: Keeps the rows of a piece of the trunk, for as long as it is gone through.
        reads: Whether numbers may be read back.
        grams: The inner products of each piece.
    """

    params: Sequence[Tensor]
    beside: Keep
    piece: Keep
    reads: bool
    grams: list[Tensor] = field(default_factory=list, kw_only=True)

    @property
    def written(self) -> set[int]:
        """The parameters beside the trunk that any task has a gradient of."""
        return self.beside.written

    @written.setter
    def written(self, numbers: set[int]) -> None:
        self.beside.written = numbers

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Keep the gradients of shared parameters beside the trunk."""
        self.beside.take(numbers, rows)

    def meet(
        self, numbers: Sequence[int], apart: Iterable[int], rows: RowStream
    ) -> Iterator[Cotangent]:
        """Let the rows of a piece meet.

        Args:
            numbers: Its parameters.
            apart: Those with sparse gradients, or products.
            rows: Their gradients, and what arrives at the bottom of the piece.

        Returns:
            The latter; each goes once it has been asked for.
        """
        n = self.n_tasks
        self.piece.open(self.params, dict.fromkeys(numbers, MODEL), apart, n, n)
        below: deque[Cotangent] = deque()
        for found in rows:
            self.piece.take(numbers, found)
            at = found.tasks
            for i, task in enumerate(range(n)[at] if isinstance(at, slice) else [at]):
                values = [v if v is None or task is at else v[i] for v in found.below]
                below.append(Cotangent(task, values, task == n - 1))
        self.piece.close()
        self.grams.append(self._guarded(self.piece))
        self.piece.sparse.clear()
        return (below.popleft() for _ in range(n))

    def drop(self, tasks: Collection[int]) -> None:
        """Forget the cotangents of some tasks, and their rows beside the trunk."""
        super().drop(tasks)
        self.beside.drop(tasks)

    def gram(self, group: str, *, scaled: bool = False) -> Tensor:
        """Return the Gram matrix, shape ``[m, m]``, float64."""
        return summed([*self.grams, self._guarded(self.beside)])

    def _guarded(self, rows: Keep) -> Tensor:
        """Return inner products that are protected if they must be, while the rows are there.

        On a CPU that can be seen; elsewhere it would take a trip to the host for every piece.
        """
        if self.reads and all(block.rows.device.type == "cpu" for block in rows.blocks):
            gram = rows.gram(MODEL)
            if not needs_scaling(gram.diagonal().tolist()):
                return gram
        return rows.gram(MODEL, scaled=True)

    def direction(self, weights: Tensor) -> dict[int, Tensor]:
        """Return the weighted sum of the cotangents, and of the rows beside the trunk."""
        beside = self.beside.direction(lambda group: weights)
        return super().direction(weights) | beside
