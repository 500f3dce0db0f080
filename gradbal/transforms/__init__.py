"""Transforms that :func:`gradbal.chain` puts before a rule. One line per transform."""

from gradbal.transforms.log_losses import LogLosses as LogLosses
from gradbal.transforms.momentum import Momentum as Momentum
from gradbal.transforms.normalize import Normalize as Normalize
from gradbal.transforms.smooth import Smooth as Smooth
from gradbal.transforms.transform import Transform as Transform

TRANSFORMS: dict[str, type[Transform]] = {
    "log_losses": LogLosses,
    "momentum": Momentum,
    "normalize": Normalize,
    "smooth": Smooth,
}
