"""What goes over the wire: a few collective operations, counted, with errors that name who is gone.

Gloo's own reductions take a hop per process and fail one after the other when a process is gone.
There everything small or scattered goes to all others at once, which takes one hop, sums in the
same order everywhere, and fails everywhere at once.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

OWNER = "MTLOptimizer"
# Of two names, the first is that of newer releases; a build without distributed has neither.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(
    dist, "reduce_scatter_tensor", None
)
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
_numbers = count()  # of the connections, made in the same order in all processes


class Link:
    """The connection among the processes of a group.

    Args:
        group: The group.

    Attributes:
        size: How many processes there are.
        rank: Which of them this is.
        sent: Bytes that this process has handed over, by kind of message, as the fewest that an
            algorithm can do with.
        calls: Number of messages, likewise.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        config = str(dist.get_backend_config(self.group))
        self.backends = dict(pair.split(":") for pair in config.split(","))
        self.host = self.group
        if "cpu" not in self.backends:  # what the host decides by need not wait for the device
            ranks = dist.get_process_group_ranks(self.group)
            self.host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self.store: Any = self.group.get_group_store()
        self.name, self.meetings = f"gradbal/{next(_numbers)}", 0
        self.given_up: RuntimeError | None = None
        self.sent: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def mark(self) -> None:
        """Leave word that this process has come to its next meeting."""
        self.meetings += 1
        self.store.set(f"{self.name}/{self.rank}", str(self.meetings))

    def leave_word(self, error: BaseException) -> None:
        """Tell those who will wait in vain why this process goes no further."""
        if error is not self.given_up:
            text = f"{type(error).__name__}: {error}"
            with suppress(RuntimeError):
                self.store.set(f"{self.name}/{self.rank}/error/{self.meetings}", text)

    def table(self, row: Tensor, kind: str = "agreement") -> Tensor:
        """Return what everybody gives, shape ``[processes, n]``; for few numbers."""
        out = row.new_empty((self.size, row.numel()))
        self._count(kind, row.nbytes * (self.size - 1))
        if self._at_once(row):
            self._told(dist.all_to_all_single, out.view(-1), row.repeat(self.size), row)
        else:
            self._told(_all_gather, out.view(-1), row.contiguous(), row)
        return out

    def differing(self, row: Tensor) -> list[int]:
        """Return the positions at which the processes' numbers differ."""
        table = self.table(row)
        return (table != table[0]).any(dim=0).nonzero().flatten().tolist()

    def objects(self, given: object) -> list[Any]:
        """Return what everybody gives; for the rare case."""
        found: list[Any] = [None] * self.size
        self._count("agreement", 0)
        try:
            dist.all_gather_object(found, given, group=self.host)
        except RuntimeError as error:
            raise self.broken() from error
        return found

    def sum_small(self, vector: Tensor, kind: str = "gram") -> Tensor:
        """Return the sum over the processes, the same to the last bit on each."""
        return self.table(vector, kind).sum(dim=0)

    def sum_large(self, flat: Tensor, kind: str) -> "Transfer":
        """Begin to sum a vector in place."""
        self._count(kind, 2 * flat.nbytes * (self.size - 1) // self.size)
        work = dist.all_reduce(flat, group=self._group(flat), async_op=True)
        return Transfer(self, work)

    def part(self, n: int) -> slice:
        """Return the part of a vector of this length that this process sums."""
        size = n // self.size
        return slice(self.rank * size, (self.rank + 1) * size)

    def scatter(self, flat: Tensor) -> "Transfer":
        """Begin to sum a vector, each process its own part of it, in place there."""
        self._count("rows", flat.nbytes * (self.size - 1) // self.size)
        mine = flat[self.part(len(flat))]
        if not self._at_once(flat):
            options = {"group": self._group(flat), "async_op": True}
            return Transfer(self, _reduce_scatter(mine, flat, **options))
        found = torch.empty_like(flat)
        work = dist.all_to_all_single(found, flat, group=self._group(flat), async_op=True)
        return Transfer(self, work, lambda: torch.sum(found.view(self.size, -1), 0, out=mine))

    def spread(self, flat: Tensor) -> "Transfer":
        """Begin to give everybody this process' part of a vector."""
        self._count("direction", flat.nbytes * (self.size - 1) // self.size)
        mine = flat[self.part(len(flat))]
        options = {"group": self._group(flat), "async_op": True}
        if self._at_once(flat):
            return Transfer(self, dist.all_to_all_single(flat, mine.repeat(self.size), **options))
        return Transfer(self, _all_gather(flat, mine, **options))

    def broken(self) -> RuntimeError:
        """Return the error that says who is gone."""
        try:
            come = [int(self._word(f"{self.name}/{rank}") or 0) for rank in range(self.size)]
            late = [str(rank) for rank, count in enumerate(come) if count < self.meetings]
            keys = [f"{self.name}/{rank}/error/{self.meetings}" for rank in range(self.size)]
            words = list(map(self._word, keys))
            failed = [f"process {r} failed with {word}" for r, word in enumerate(words) if word]
            gone = [f"process {', '.join(late)} is gone or busy elsewhere"] if late else []
            why = "; ".join(failed or gone or ["a process was lost in the midst of it"])
        except RuntimeError:
            why = "the process that hosts the rendezvous is gone"
        self.given_up = RuntimeError(
            f"{OWNER}: step {self.meetings} of {self.size} processes was broken off in process "
            f"{self.rank}, because {why}; go on from the last checkpoint."
        )
        return self.given_up

    def _word(self, key: str) -> str:
        """Return what somebody has left in the store; nothing if nobody has."""
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _at_once(self, tensor: Tensor) -> bool:
        return self.backends.get(tensor.device.type, "gloo") == "gloo"

    def _group(self, tensor: Tensor) -> Any:
        return self.group if tensor.device.type in self.backends else self.host

    def _told(self, call: Callable[..., Any], out: Tensor, given: Tensor, like: Tensor) -> None:
        try:
            call(out, given, group=self._group(like))
        except RuntimeError as error:
            raise self.broken() from error

    def _count(self, kind: str, nbytes: int) -> None:
        self.sent[kind] = self.sent.get(kind, 0) + nbytes
        self.calls[kind] = self.calls.get(kind, 0) + 1


class Transfer:
    """Something under way.

    Args:
        link: Over what.
        work: Torch's handle.
        then: What is to be done when it has come.
    """

    def __init__(self, link: Link, work: Any, then: Callable[[], Any] = lambda: None) -> None:
        self.link, self.work, self.then = link, work, then

    def finish(self) -> None:
        """Wait for it.

        Raises:
            RuntimeError: If a process is gone.
        """
        try:
            self.work.wait()
        except RuntimeError as error:
            raise self.link.broken() from error
        self.then()
