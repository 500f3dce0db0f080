"""Transforms that :func:`gradbal.rules._chain` puts before a rule. One line per transform."""

from gradbal.rules.transforms.log_losses import LogLosses as LogLosses
from gradbal.rules.transforms.momentum import Momentum as Momentum
from gradbal.rules.transforms.normalize import Normalize as Normalize
from gradbal.rules.transforms.smooth import Smooth as Smooth
from gradbal.rules.transforms.transform import Transform as Transform

TRANSFORMS: dict[str, type[Transform]] = {
    "log_losses": LogLosses,
    "momentum": Momentum,
    "normalize": Normalize,
    "smooth": Smooth,
}
