"""Where task gradients go: kept as blocks of the Jacobian, or turned into a Gram matrix at once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradbal.blocks import Block, lay_out, place_of
from gradbal.crossing import Product, Rows, product_gram
from gradbal.gram import added, combine, gram_matrix, sparse_gram, stacked

Weigh = Callable[[str], Tensor | None]
Row = Tensor | Product | None


class Keep:
    """Keep the rows: blocks of the Jacobian, preallocated once and used in every step.

    Gradients that are sparse, or products that are not formed, stay so and are kept apart.
    """

    def __init__(self) -> None:
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
            params: All parameters of the optimizer.
            groups: The group of every shared parameter, by number.
            sparse: Parameters with sparse gradients, or products.
            n_rows: Rows to allocate; the number of tasks that may ever be present.
            n_tasks: Rows in use.
        """
        self.groups, self.n_tasks = groups, n_tasks
        self.sparse = {number: [None] * n_tasks for number in groups if number in sparse}
        places = [place_of(params[number]) for number in groups]
        layout = (groups, places, frozenset(self.sparse), n_rows)
        if layout != self.layout:
            self.blocks = []  # the old storage goes before the new is taken
            self.blocks = lay_out(params, groups, self.sparse, n_rows)
            self.layout = layout
        self.unwritten = [set(groups) - set(self.sparse) for _ in range(n_tasks)]

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
                torch._foreach_copy_([views[n] for n in here], [_dense(found[n]) for n in here])

    def close(self) -> None:
        """Set to zero what no task has written."""
        for task, numbers in enumerate(self.unwritten):
            for block in self.blocks if numbers else ():
                views = block.at(task)
                missing = [views[n] for n in views if n in numbers]
                if missing:
                    torch._foreach_zero_(missing)
        silent = set.intersection(*self.unwritten) if self.unwritten else set()
        self.written = set(self.groups) - silent
        self.unwritten = []

    def gram(self, group: str, *, scaled: bool = False) -> Tensor:
        """Return the Gram matrix of a group, shape ``[m, m]``, float64."""
        parts = [
            gram_matrix(block.rows[: self.n_tasks], scaled=scaled)
            for block in self.blocks
            if block.group == group
        ]
        parts += [
            _gram_apart(rows, scaled=scaled)
            for number, rows in self.sparse.items()
            if self.groups[number] == group and any(row is not None for row in rows)
        ]
        return _total(parts) if parts else torch.zeros(self.n_tasks, self.n_tasks).double()

    def direction(self, weigh: Weigh, *, in_place: bool) -> dict[int, Tensor]:
        """Return the weighted sum of the rows, one tensor per parameter.

        Args:
            weigh: Gives the weights of a group, shape ``[m]``; None where no task reaches it.
            in_place: Write into the flat storage, of which the gradients are views.
        """
        out: dict[int, Tensor] = {}
        for block in self.blocks:
            weights = weigh(block.group)
            if weights is None:
                continue
            rows = block.rows[: len(weights)]
            flat = combine(rows, weights.to(rows.device), block.flat if in_place else None)
            views = block.views(flat, "flat" if in_place else None)
            out |= {number: view for number, view in views.items() if number in self.written}
        for number, column in self.sparse.items():
            weights = weigh(self.groups[number])
            total = None if weights is None else _weighted(column[: len(weights)], weights)
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

    def buffers(self) -> dict[int, Tensor]:
        """Return where each dense parameter's gradient is stored."""
        views: dict[int, Tensor] = {}
        for block in self.blocks:
            views |= block.views(block.flat, "flat")
        return views

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


@dataclass
class GramOnly:
    """Keep the tasks' cotangents at the cut, from which one pass goes down once weights are known.

    Attributes:
        n_tasks: How many tasks there are.
        n_edges: How many edges the cut has; their cotangents come first.
        first: Number of the first edge, after those of all parameters.
        pool: Sum rows over the batch axis before they meet (LibMTL's way; no bound is known).
        slots: Which cotangents form a row, as groups of positions: one group is one piece of the
            row, and its members are summed, which needs ``pool``.
    """

    n_tasks: int
    n_edges: int
    first: int
    pool: bool = False
    slots: Sequence[Sequence[int]] = ()
    held: list[Sequence[Tensor | None]] = field(default_factory=list)
    beside: dict[int, list[Tensor | None]] = field(default_factory=dict)

    def take(self, numbers: Sequence[int], rows: Rows) -> None:
        """Keep the gradients of shared parameters beside the cut."""
        for number, grad in zip(numbers, rows.grads, strict=True):
            column = self.beside.setdefault(number, [None] * self.n_tasks)
            column[rows.tasks] = grad  # type: ignore[index,assignment]  # single tasks, and tensors

    def gram(self, group: str = "", *, scaled: bool = False) -> Tensor:
        """Return the Gram matrix of the representation's gradients, shape ``[m, m]``, float64."""
        parts = []
        for slot in self.slots:
            rows = [self._row(values, slot) for values in self.held]
            if (filled := stacked(rows)) is not None:
                parts.append(gram_matrix(filled, scaled=scaled))
        if not parts:  # one task alone: there is no cut
            parts = [
                sparse_gram(rows)
                for rows in self.beside.values()
                if any(r is not None for r in rows)
            ]
        return _total(parts)

    def stacks(self, group: str) -> dict[int, Tensor]:
        """Return the rows of each edge of the cut, numbered on, and of parameters beside it."""
        found = {self.first + i: stacked(column) for i, column in enumerate(self._columns())}
        found |= {number: stacked(rows) for number, rows in self.beside.items()}
        return {number: rows for number, rows in found.items() if rows is not None}

    def like_rows(self, direction: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return a direction found entry by entry as it is."""
        return dict(direction)

    def _columns(self) -> list[tuple[Tensor | None, ...]]:
        """Return the cotangents of each edge of the cut, one per task."""
        return list(zip(*(values[: self.n_edges] for values in self.held), strict=True))

    def _row(self, values: Sequence[Tensor | None], slot: Sequence[int]) -> Tensor | None:
        pieces = [value for i in slot if (value := values[i]) is not None]
        if self.pool:
            pieces = [piece.sum(dim=0) for piece in pieces]
        if not pieces:
            return None
        total = pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(dim=0)
        return total.flatten()

    def direction(self, weights: Tensor) -> dict[int, Tensor]:
        """Return the weighted sum of the rows, numbered as in ``stacks``."""
        sums = {self.first + i: _weighted(col, weights) for i, col in enumerate(self._columns())}
        sums |= {number: _weighted(rows, weights) for number, rows in self.beside.items()}
        return {number: total for number, total in sums.items() if total is not None}


def _gram_apart(rows: Sequence[Row], *, scaled: bool) -> Tensor:
    """Return the inner products of products or sparse rows; None counts as zero."""
    uses = [row.layer.uses[0] for row in rows if isinstance(row, Product)]
    if uses and all(uses[0].goes_with(use) for use in uses):
        products = [row for row in rows if row is None or isinstance(row, Product)]
        if len(products) == len(rows):
            return product_gram(products, scaled=scaled)
    return sparse_gram([row.to_dense() if isinstance(row, Product) else row for row in rows])


def _weighted(rows: Sequence[Row], weights: Tensor) -> Tensor | None:
    """Sum the rows times their weights, sparse, dense or products, in at least float32."""
    layer = next((row.layer for row in rows if isinstance(row, Product)), None)
    if layer is not None:
        nothing = [None] * len(layer.uses)
        each = [row.cotangents if isinstance(row, Product) else nothing for row in rows]
        return layer.gradient([_weighted(c, weights) for c in zip(*each, strict=True)])
    total, dtype = None, torch.float32
    for row, weight in zip(rows, weights, strict=True):
        if isinstance(row, Tensor):
            dtype = row.dtype
            wide = torch.promote_types(dtype, torch.float32)
            term = row.to(wide) * weight.to(row.device, wide)
            total = term if total is None else added(total, term)
    return None if total is None else total.to(dtype)


def _dense(row: Tensor | Product) -> Tensor:
    return row.to_dense() if isinstance(row, Product) or row.is_sparse else row


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total
