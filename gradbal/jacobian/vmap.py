"""Several tasks in one pass, batched with ``torch.func.vmap``."""

import itertools
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from gradbal._utils.log import log
from gradbal.jacobian.loop import loop
from gradbal.jacobian.pull import Cotangent, Cotangents, Rows, RowStream, Segment, pull
from gradbal.solvers.gram import stacked


class Batch:
    """Take the cotangents down in chunks of tasks.

    An operation that cannot be batched (a compiled region, a custom function that leaves torch,
    a sparse gradient ...) sends the tasks one by one from then on, with one line in the log.

    Args:
        chunk_size: Tasks per pass; None for all at once.
    """

    def __init__(self, chunk_size: int | None = None) -> None:
        self.chunk_size = chunk_size
        self.refused = False
        self.proven: set[object] = set()  # structures of graphs that could be batched

    def __call__(self, segment: Segment, cotangents: Cotangents) -> RowStream:
        queue = iter(cotangents)
        while not self.refused and (chunk := list(itertools.islice(queue, self.chunk_size))):
            free = segment.structure in self.proven and chunk[-1].last and not segment.retain_graph
            try:
                rows = _cross(segment, chunk, last=free)
            except (RuntimeError, NotImplementedError) as error:
                if free:
                    self.refused = True
                    raise RuntimeError(
                        "Batched: an operation that cannot be batched appeared in a graph that "
                        "looks like earlier ones, and its buffers are gone; compute the losses "
                        "again and repeat the step, which then goes one task at a time."
                    ) from error
                reason = str(error).strip().splitlines()[0] if str(error) else repr(error)
                log.warning("Batched: going on one task at a time, because: %s", reason)
                self.refused = True
                queue = itertools.chain(chunk, queue)
            else:
                if chunk[-1].last:
                    self.proven.add(segment.structure)
                yield rows
        yield from loop(segment, queue)


def _cross(segment: Segment, chunk: Sequence[Cotangent], *, last: bool) -> Rows:
    """Take one chunk down; with the graph kept, a failure can be made good."""
    tasks = slice(chunk[0].task, chunk[-1].task + 1)
    values = [stacked(column) for column in zip(*(c.values for c in chunk), strict=True)]
    given = [value for value in values if value is not None]
    if not given:
        return Rows(tasks, [None] * len(segment.params), [None] * len(segment.bottom))
    edges = zip(segment.top, values, strict=True)
    top = tuple(edge for edge, value in edges if value is not None)
    missing: set[int] = set()

    def pull_all(*cotangents: Tensor) -> list[Tensor]:
        grads, below = pull(segment._replace(top=top), cotangents, last=last)
        found = [*grads, *below]
        missing.update(i for i, grad in enumerate(found) if grad is None)
        return [cotangents[0].new_zeros(()) if grad is None else grad for grad in found]

    with warnings.catch_warnings():  # an operation that loops inside is slower, not wrong
        warnings.filterwarnings("ignore", message="There is a performance drop")
        found = torch.func.vmap(pull_all)(*given)
    grads = [None if i in missing else grad for i, grad in enumerate(found)]
    split = len(segment.params)
    return Rows(tasks, grads[:split], grads[split:])
