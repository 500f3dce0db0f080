"""What is kept of a step."""

from typing import NamedTuple

from gradbal.step.record import StepRecord


class Step(NamedTuple):
    """A step that was taken.

    Attributes:
        number: How many were taken before it.
        seconds: Wall-clock time since the optimizer's step before it ended, forward pass and
            loading included; NaN for the first.
        skipped: How many were left out before it because something was not finite.
        record: What the optimizer left behind, on its device.
    """

    number: int
    seconds: float
    skipped: int
    record: StepRecord
