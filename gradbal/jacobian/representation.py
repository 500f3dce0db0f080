"""Named modules as the place where task gradients are looked at."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradbal.distributed import Processes, shared_out
from gradbal.graph.heads_and_trunk import Place, Plan, mark
from gradbal.graph.walk import Boundary, made_of_parameters, several
from gradbal.jacobian.pull import Rows
from gradbal.jacobian.sparse import summed, weighted
from gradbal.jacobian.streamed import GramOnly
from gradbal.solvers.gram import gram_matrix, sparse_gram, stacked


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

    def drop(self, tasks: Collection[int]) -> None:
        """Forget the cotangents of some tasks, and their rows beside the cut."""
        super().drop(tasks)
        for column in self.beside.values():
            for task in tasks:
                column[task] = None

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


class Marker:
    """A forward hook that marks a module's outputs in the graph; it holds no tensor."""

    def __init__(self, tag: object, module: int) -> None:
        self.tag, self.module = tag, module

    def __call__(self, module: object, args: object, output: object) -> None:
        """Mark the outputs."""
        mark(output, self.tag, self.module)


def watch(modules: Sequence[nn.Module], tag: object) -> list[RemovableHandle]:
    """Mark the outputs of modules in every forward pass from now on."""
    return [
        module.register_forward_hook(Marker(tag, number)) for number, module in enumerate(modules)
    ]


def check_marks(plan: Plan, n_modules: int, *, mixed: bool) -> None:
    """Raise if a module took no part, or if its calls cannot be compared.

    Args:
        plan: The plan.
        n_modules: How many modules were named.
        mixed: Whether gradients of different inputs may meet.

    Raises:
        RuntimeError: In one sentence.
    """
    places = {edge.place for edge in plan.marked}
    for module in range(n_modules):
        if module not in {place[0] for place in places}:
            raise RuntimeError(
                f"Representation: module {module} of those named took no part in these losses; "
                "name modules whose outputs the losses depend on."
            )
    apart = not any(several(edge.tasks) for edge in plan.marked)
    if apart and not mixed and len(plan.marked) > len(places):
        raise RuntimeError(
            "Representation: each task has inputs of its own, and gradients for different inputs "
            'share no space; pass pool="batch" to sum them over the batch, or choose another '
            "engine."
        )


def boundary(plan: Plan) -> Boundary:
    """Return the cut, and after it the marked edges that are not on it."""
    cut = set(plan.cut)
    return (*plan.cut, *(edge for edge, *_ in plan.marked if edge not in cut))


def represented(plan: Plan, n_params: int, processes: Processes, *, pool: bool) -> Represented:
    """Return a sink whose rows are the gradients at the marked edges, or else at the cut."""
    sink = Represented(len(plan.tasks), len(plan.cut), n_params, processes, pool)
    position = {edge: i for i, edge in enumerate(boundary(plan))}
    if not plan.marked:
        sink.slots = [[i] for i in position.values()]
    elif not pool:
        sink.slots = [[position[edge]] for edge, *_ in plan.marked]
    else:
        calls: dict[Place, list[int]] = {}
        for edge, place, _ in plan.marked:
            calls.setdefault(place, []).append(position[edge])
        sink.slots = list(calls.values())
    sink.peers = plan.peers
    if processes.size > 1 and processes.even:
        edges = list(position)
        sink.alike = {i for i, slot in enumerate(sink.slots) if made_of_parameters(edges[slot[0]])}
    return sink
