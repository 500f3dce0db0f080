"""One task after the other: the reference for the other crossings."""

import torch

from gradbal.crossing.segment import Cotangents, Rows, RowStream, Segment


def loop(segment: Segment, cotangents: Cotangents) -> RowStream:
    """Take the cotangents down one task at a time; each is asked for when its turn comes."""
    for task, values, last in cotangents:
        present = [i for i, value in enumerate(values) if value is not None]
        yield Rows(
            task,
            torch.autograd.grad(
                [segment.top[i] for i in present],
                list(segment.params),
                [values[i] for i in present],
                retain_graph=segment.retain_graph or not last,
                allow_unused=True,
            )
            if present
            else [None] * len(segment.params),
        )
