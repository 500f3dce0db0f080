"""gradbal: gradient balancing for several losses, as a torch optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING

from gradbal import engines as engines
from gradbal import rules as rules
from gradbal import transforms as transforms
from gradbal.aggregation import Aggregation as Aggregation
from gradbal.aggregation import aggregate as aggregate
from gradbal.chain import chain as chain
from gradbal.optimizer import MTLOptimizer as MTLOptimizer
from gradbal.registry import make_rule as make_rule
from gradbal.registry import register as register
from gradbal.registry import rule_names as rule_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradbal.diagnostics import Recorder as Recorder
else:

    def __getattr__(name: str) -> object:
        """Import what training does not need when it is asked for."""
        if name == "Recorder":
            return import_module("gradbal.diagnostics").Recorder
        raise AttributeError(f"module 'gradbal' has no attribute {name!r}")
