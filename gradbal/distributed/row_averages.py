"""Rows of task gradients, averaged over the processes while the next ones are computed."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradbal.distributed.collectives import Link, Transfer
from gradbal.distributed.layout import RowStorage

IN_FLIGHT = 2  # rows on their way at a time; each needs room of its own


class NoExchange:
    """What is done with rows in a process alone: nothing."""

    def send(self, task: int) -> None:
        """Take a row that is complete; rows come in order."""

    def finish(self, sparse: dict[int, list[Any]]) -> None:
        """Wait for all rows.

        Args:
            sparse: Sparse rows of each parameter; replaced by their averages.
        """

    def spread(self, block: RowStorage, flat: Tensor) -> None:
        """Let everybody have the whole of a direction of which each has a part."""


class Exchange(NoExchange):
    """Average rows of replicas: in parts where no process needs the whole.

    Args:
        link: The connection.
        blocks: Where the rows are.
        n_tasks: How many rows are in use.
        params: All parameters.
    """

    def __init__(
        self, link: Link, blocks: Sequence[RowStorage], n_tasks: int, params: Sequence[Tensor]
    ) -> None:
        self.link, self.n_tasks, self.params = link, n_tasks, params
        self.blocks = [block for block in blocks if block.averaged and block.numbers]
        self.transfers: deque[Transfer] = deque()

    def send(self, task: int) -> None:
        for block in self.blocks:
            if block.columns.in_parts:
                self.transfers.append(self.link.scatter(block.rows[task]))
        while len(self.transfers) > IN_FLIGHT * len(self.blocks):
            self.transfers.popleft().finish()

    def finish(self, sparse: dict[int, list[Any]]) -> None:
        for block in self.blocks:
            if not block.columns.in_parts:
                rows = block.rows[: self.n_tasks].view(-1)
                self.transfers.append(self.link.sum_large(rows, "rows"))
        while self.transfers:
            self.transfers.popleft().finish()
        for block in self.blocks:
            block.mine(self.n_tasks).div_(self.link.size)
        for number in sorted(sparse):
            like = self.params[number]
            summed = [sum_sparse(self.link, row, like) for row in sparse[number]]
            sparse[number] = [row / self.link.size if row._nnz() else None for row in summed]

    def spread(self, block: RowStorage, flat: Tensor) -> None:
        if block.columns.in_parts:
            self.link.spread(flat).finish()


def sum_sparse(link: Link, grad: Tensor | None, like: Tensor) -> Tensor:
    """Sum a sparse gradient; who has none gives nothing.

    Args:
        link: The connection.
        grad: The gradient here.
        like: The parameter.
    """
    if grad is None:
        grad = torch.sparse_coo_tensor(
            torch.empty((1, 0), dtype=torch.int64, device=like.device),
            like.new_empty((0, *like.shape[1:])),
            like.shape,
        )
    grad = (grad if grad.is_sparse else grad.to_sparse(1)).coalesce()
    index, values = grad.indices(), grad.values().flatten(1)
    sizes = link.table(torch.tensor([index.shape[1]])).flatten().tolist()
    most = max(sizes)
    padded = values.new_zeros((most, values.shape[1]))
    padded[: len(values)] = values
    places = index.new_zeros((len(index), most))
    places[:, : index.shape[1]] = index
    all_values = link.table(padded.flatten(), "rows").view(link.size, most, -1)
    all_places = link.table(places.flatten(), "rows").view(link.size, len(index), most)
    total = torch.sparse_coo_tensor(
        torch.cat([all_places[i, :, :n] for i, n in enumerate(sizes)], dim=1),
        torch.cat([all_values[i, :n] for i, n in enumerate(sizes)]).view(-1, *like.shape[1:]),
        like.shape,
    )
    return total.coalesce()
