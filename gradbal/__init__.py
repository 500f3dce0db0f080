"""gradbal: gradient balancing for several losses, as a torch optimizer."""

from importlib import import_module
from typing import TYPE_CHECKING

from gradbal import engines as engines
from gradbal import rules as rules
from gradbal._compat import serve_old_paths as _serve_old_paths
from gradbal.aggregation import Aggregation as Aggregation
from gradbal.aggregation import aggregate as aggregate
from gradbal.optimizer import MTLOptimizer as MTLOptimizer
from gradbal.rules._base import Claim as Claim
from gradbal.rules._base import Context as Context
from gradbal.rules._base import GradientRule as GradientRule
from gradbal.rules._base import GramRule as GramRule
from gradbal.rules._base import LossRule as LossRule
from gradbal.rules._base import Rule as Rule
from gradbal.rules._chain import chain as chain
from gradbal.rules._registry import make_rule as make_rule
from gradbal.rules._registry import register as register
from gradbal.rules._registry import rule_names as rule_names

if TYPE_CHECKING:
    from gradbal import diagnostics as diagnostics
    from gradbal.diagnostics import Recorder as Recorder
    from gradbal.diagnostics import plots as plots
    from gradbal.rules import transforms as transforms

__version__ = "0.1.0"

_LATER = {  # imported when somebody asks for it: training needs none of it
    "Recorder": "gradbal.diagnostics",
    "diagnostics": "gradbal.diagnostics",
    "plots": "gradbal.diagnostics.plots",
    "transforms": "gradbal.rules.transforms",
}

__all__ = [
    "Aggregation",
    "Claim",
    "Context",
    "GradientRule",
    "GramRule",
    "LossRule",
    "MTLOptimizer",
    "Recorder",
    "Rule",
    "aggregate",
    "chain",
    "diagnostics",
    "engines",
    "make_rule",
    "plots",
    "register",
    "rule_names",
    "rules",
    "transforms",
]

_serve_old_paths()


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'gradbal' has no attribute {name!r}")
    module = import_module(_LATER[name])
    return module.Recorder if name == "Recorder" else module


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
