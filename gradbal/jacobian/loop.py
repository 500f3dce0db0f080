"""One task after the other: the reference for the other crossings."""

from gradbal.jacobian.pull import Cotangents, Rows, RowStream, Segment, pull


def loop(segment: Segment, cotangents: Cotangents) -> RowStream:
    """Take the cotangents down one task at a time; each is asked for when its turn comes."""
    for task, values, last in cotangents:
        yield Rows(task, *pull(segment, values, last=last))
