"""One task after the other: the reference for the other crossings."""

from gradbal.crossing.segment import Cotangents, Rows, RowStream, Segment, pull


def loop(segment: Segment, cotangents: Cotangents) -> RowStream:
    """Take the cotangents down one task at a time; each is asked for when its turn comes."""
    guard = True  # if the first pass meets no hooks at the top, the others will not
    for task, values, last in cotangents:
        grads, below, guarded = pull(segment, values, last=last, guard=guard)
        guard = guarded or (guard and all(value is None for value in values))
        yield Rows(task, grads, below)
