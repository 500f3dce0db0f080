"""Rows that meet and are not kept: one pass goes down from the cut once weights are known."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradbal.blocks import MODEL
from gradbal.crossing import Cotangent, Rows, RowStream
from gradbal.distributed import Processes, shared_out
from gradbal.gram import gram_matrix, needs_scaling, sparse_gram, stacked
from gradbal.sinks.apart import summed, weighted
from gradbal.sinks.keep import Keep


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

    def direction(self, weights: Tensor) -> dict[int, Tensor]:
        """Return the weighted sum of the cotangents at each edge of the cut, numbered on."""
        sums = {self.first + i: weighted(col, weights) for i, col in enumerate(self._columns())}
        return {number: total for number, total in sums.items() if total is not None}

    def _columns(self) -> list[tuple[Tensor | None, ...]]:
        """Return the cotangents of each edge of the cut, one per task."""
        return list(zip(*(values[: self.n_edges] for values in self.held), strict=True))


@dataclass
class Represented(GramOnly):
    """Let the cotangents meet, at the cut or where modules were named.

    Attributes:
        processes: Each with samples of its own at the representation.
        pool: Sum rows over the batch axis before they meet (LibMTL's way; no bound is known).
        slots: Which cotangents form a row, as groups of positions: one group is one piece of the
            row, and its members are summed, which needs ``pool``.
        peers: How many processes work together on one part of the batch.
        alike: Positions of slots that stand for the same in all processes, not for samples.
        beside: Gradients of shared parameters beside the cut, by parameter and task.
    """

    processes: Processes
    pool: bool = False
    slots: Sequence[Sequence[int]] = ()
    peers: int = 1
    alike: Collection[int] = ()
    beside: dict[int, list[Tensor | None]] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Keep the gradients of shared parameters beside the cut."""
        for number, grad in zip(numbers, rows.grads, strict=True):
            column = self.beside.setdefault(number, [None] * self.n_tasks)
            column[rows.tasks] = grad  # type: ignore[index,assignment]  # single tasks, and tensors

    def gram(self, group: str = "", *, scaled: bool = False) -> Tensor:
        """Return this process' part of the Gram matrix at the representation, ``[m, m]``, float64.

        Every process has other samples, so their rows are joined and not averaged.
        """
        size = self.processes.size
        parts = []
        for i, slot in enumerate(self.slots):
            stack = stacked([self._row(values, slot) for values in self.held])
            joined = size**2 // self.peers
            if size > 1 and (self.pool or i in self.alike):
                stack = self._averaged(stack)
                joined = size
            if stack is not None:
                parts.append(shared_out(gram_matrix(stack, scaled=scaled), joined))
        if not self.slots and self.processes.even:  # one task alone: there is no cut
            self._average_beside()
            parts = [
                shared_out(sparse_gram(rows), size)
                for rows in self.beside.values()
                if any(r is not None for r in rows)
            ]
        none = torch.zeros(self.n_tasks, self.n_tasks, dtype=torch.float64)
        return summed(parts) if parts else none

    def stacks(self, group: str) -> dict[int, Tensor]:
        """Return the rows of each edge of the cut, numbered on, and of parameters beside it."""
        found = {self.first + i: stacked(column) for i, column in enumerate(self._columns())}
        found |= {number: stacked(rows) for number, rows in self.beside.items()}
        return {number: rows for number, rows in found.items() if rows is not None}

    def like_rows(self, direction: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return a direction found entry by entry as it is."""
        return dict(direction)

    def direction(self, weights: Tensor) -> dict[int, Tensor]:
        """Return the weighted sum of the rows, numbered as in ``stacks``."""
        sums = {number: weighted(rows, weights) for number, rows in self.beside.items()}
        beside = {number: total for number, total in sums.items() if total is not None}
        return super().direction(weights) | beside

    def _averaged(self, stack: Tensor | None) -> Tensor | None:
        """Average rows that stand for the same in all processes."""
        if stack is None:  # in all processes: their plans agree
            return None
        return self.processes.sum(stack.flatten()).view_as(stack) / self.processes.size

    def _average_beside(self) -> None:
        """Average what lies beside the cut."""
        for task in range(self.n_tasks):
            column = {n: r for n, rows in self.beside.items() if (r := rows[task]) is not None}
            for number, row in self.processes.average(column).items():
                self.beside.setdefault(number, [None] * self.n_tasks)[task] = row

    def _row(self, values: Sequence[Tensor | None], slot: Sequence[int]) -> Tensor | None:
        pieces = [value for i in slot if (value := values[i]) is not None]
        if self.pool:
            pieces = [piece.sum(dim=0) for piece in pieces]
        if not pieces:
            return None
        total = pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(dim=0)
        return total.flatten()


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
