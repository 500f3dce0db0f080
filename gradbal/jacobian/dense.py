"""Task gradients kept as blocks of the Jacobian."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal._utils.devices import on_device
from gradbal.distributed import ALONE, Processes, shared_out
from gradbal.jacobian.blocks import Block, Room, lay_out, place_of
from gradbal.jacobian.pull import Rows
from gradbal.jacobian.sparse import Row, formed, gram_apart, summed, weighted
from gradbal.solvers.gram import combine, gram_matrix, stacked

Weigh = Callable[[str], Tensor | None]


class Keep:
    """Keep the rows: blocks of the Jacobian, preallocated once and used in every step.

    Gradients that are sparse, or products that are not formed, stay so and are kept apart.

    Args:
        room: Where rows are stored.
        processes: Over which rows are averaged, as soon as they are complete.
    """

    def __init__(self, room: Room = torch.empty, processes: Processes = ALONE) -> None:
        self.room, self.processes = room, processes
        self.blocks: list[Block] = []
        self.layout: object = None
        self.sparse: dict[int, list[Row]] = {}
        self.written: set[int] = set()

    def open(
        self,
        params: Sequence[Tensor],
        groups: Mapping[int, str],
        sparse: Iterable[int],
        n_rows: int,
        n_tasks: int,
    ) -> None:
        """Make room for ``n_tasks`` rows over the parameters numbered in ``groups``.

        With several batches there is a row for each task in each batch.

        Args:
            params: What this process holds of each parameter of the optimizer.
            groups: The group of every shared parameter, by number.
            sparse: Parameters with sparse gradients, or products.
            n_rows: Rows to allocate; the number of tasks that may ever be present.
            n_tasks: Rows in use.
        """
        self.groups, self.n_tasks = groups, n_tasks
        self.device = params[0].device if params else torch.device("cpu")
        self.sparse = {number: [None] * n_tasks for number in groups if number in sparse}
        places = [place_of(params[number]) for number in groups]
        layout = (groups, places, frozenset(self.sparse), n_rows)
        if layout != self.layout:
            self.blocks = []  # the old storage goes before the new is taken
            self.blocks = lay_out(params, groups, self.sparse, n_rows, self.room, self.processes)
            self.layout = layout
        for block in self.blocks:
            if block.used < block.columns.width:
                block.rows[:, block.used :] = 0
        self.unwritten = [set(groups) - set(self.sparse) for _ in range(n_tasks)]
        self.exchange = self.processes.rows(self.blocks, n_tasks)
        self.written, self.n_sent = set(self.sparse), 0

    def nbytes(self) -> int:
        """Bytes of the storage."""
        return sum(block.rows.nbytes for block in self.blocks)

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Store the gradients of some tasks for some parameters."""
        at = rows.tasks
        chunk = isinstance(at, slice)
        tasks = list(range(self.n_tasks)[at]) if isinstance(at, slice) else [at]
        found = {n: grad for n, grad in zip(numbers, rows.grads, strict=True) if grad is not None}
        for number in self.sparse.keys() & found.keys():
            grad = found.pop(number)
            for i, task in enumerate(tasks):
                self.sparse[number][task] = grad[i] if chunk else grad
        for task in tasks:
            self.unwritten[task] -= found.keys()
        for block in self.blocks:
            views = block.at(at)
            here = [n for n in views if n in found]
            if here:
                torch._foreach_copy_([views[n] for n in here], [formed(found[n]) for n in here])
        self.written |= found.keys()
        while self.n_sent < self.n_tasks and not self.unwritten[self.n_sent]:
            self._send()

    def close(self) -> None:
        """Set to zero what no task has written, and wait until all rows are averaged."""
        while self.n_sent < self.n_tasks:
            self._send()
        self.exchange.finish(self.sparse)

    def _send(self) -> None:
        """Hand on the next row: all processes do it in the same order."""
        task = self.n_sent
        for block in self.blocks if self.unwritten[task] else ():
            views = block.at(task)
            missing = [views[n] for n in views if n in self.unwritten[task]]
            if missing:
                torch._foreach_zero_(missing)
        self.exchange.send(task)
        self.n_sent += 1

    def gram(self, group: str, *, scaled: bool = False) -> Tensor:
        """Return this process' part of the Gram matrix of a group, ``[m, m]``, float64."""
        parts = [
            shared_out(gram_matrix(block.mine(self.n_tasks), scaled=scaled), block.columns.copies)
            for block in self.blocks
            if block.group == group
        ]
        parts += [
            shared_out(gram_apart(rows, scaled=scaled), self.processes.size)
            for number, rows in self.sparse.items()
            if self.groups[number] == group and any(row is not None for row in rows)
        ]
        return summed(parts) if parts else self.empty_gram()

    def empty_gram(self) -> Tensor:
        """Return the inner products of rows without entries, where the parameters are."""
        size = (self.n_tasks, self.n_tasks)
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def drop(self, tasks: Collection[int]) -> None:
        """Forget the rows of some tasks."""
        for task in tasks:
            for block in self.blocks:
                block.rows[task] = 0
            for column in self.sparse.values():
                column[task] = None

    def direction(self, weigh: Weigh) -> dict[int, Tensor]:
        """Return the weighted sum of the rows in new tensors, one per parameter.

        Args:
            weigh: Gives the weights of a group, shape ``[m]``; None where no task reaches it.
        """
        out: dict[int, Tensor] = {}
        for block in self.blocks:
            weights = weigh(block.group)
            if weights is None:
                continue
            rows, mine = block.mine(len(weights)), block.columns.mine
            flat = torch.empty(block.columns.width, dtype=rows.dtype, device=rows.device)
            combine(rows, on_device(weights, rows.device), flat[mine])
            self.exchange.spread(block, flat)
            views = block.views(flat)
            out |= {number: view for number, view in views.items() if number in self.written}
        for number, column in self.sparse.items():
            weights = weigh(self.groups[number])
            total = None if weights is None else weighted(column[: len(weights)], weights)
            if total is not None:
                out[number] = total
            column.clear()  # what it holds is needed no more, and may be of the size of activations
        return out

    def like_rows(self, direction: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return a direction found entry by entry, sparse where the rows are, none where none."""
        out = {number: d for number, d in direction.items() if number in self.written}
        for number, rows in self.sparse.items():
            kinds = {
                row.sparse_dim() if isinstance(row, Tensor) and row.is_sparse else 0
                for row in rows
                if row is not None
            }
            if number in out and 0 not in kinds:
                out[number] = out[number].to_sparse(max(kinds))
        return out

    def stacks(self, group: str) -> dict[int, Tensor]:
        """Return the rows of each parameter of a group, shape ``[m, *shape]``."""
        views: dict[int, Tensor] = {}
        for block in self.blocks:
            if block.group == group:
                rows = block.rows[: self.n_tasks]
                views |= block.views(rows, ("stack", self.n_tasks))
        for number, sparse in self.sparse.items():
            dense = stacked([None if row is None else row.to_dense() for row in sparse])
            if dense is not None and self.groups[number] == group:
                views[number] = dense
        return views


@dataclass(frozen=True)
class Further:
    """The place of a further batch in a sink: after the rows of those before it."""

    sink: Keep
    first: int

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Store the gradients of some of its tasks for some parameters."""
        at, first = rows.tasks, self.first
        if isinstance(at, slice):
            self.sink.take(numbers, Rows(slice(at.start + first, at.stop + first), rows.grads))
        else:
            self.sink.take(numbers, Rows(at + first, rows.grads))
