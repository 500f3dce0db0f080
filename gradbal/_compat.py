"""Old documented import paths, each served by the module that took its place.

Nothing is imported until somebody asks for an old path. Only this module knows them.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MOVED = {
    # used in the documentation of version 0.1
    "gradbal.bench": "gradbal.lab.bench",
    "gradbal.checks": "gradbal._utils.checks",
    "gradbal.compare": "gradbal.lab.compare",
    "gradbal.compare.encoders": "gradbal.lab.models.encoders",
    "gradbal.compare.intervals": "gradbal.lab.training.intervals",
    "gradbal.compare.losses": "gradbal.lab.problems.losses",
    "gradbal.compare.metrics": "gradbal.lab.problems.metrics",
    "gradbal.compare.problem": "gradbal.lab.problems.problem",
    "gradbal.compare.problems": "gradbal.lab.problems",
    "gradbal.compare.summary": "gradbal.lab.training.summary",
    "gradbal.compare.toy": "gradbal.lab.toy.problem",
    "gradbal.demo": "gradbal.lab.demo",
    "gradbal.plots": "gradbal.diagnostics.plots",
    "gradbal.registry": "gradbal.rules._registry",
    "gradbal.rule": "gradbal.rules._base",
    "gradbal.transforms": "gradbal.rules.transforms",
    # in pickles of an optimizer
    "gradbal.arguments": "gradbal.step.options",
    "gradbal.core": "gradbal.step.state",
    "gradbal.pending": "gradbal.step.accumulate",
    "gradbal.several": "gradbal.optim.several",
}


class _Moved(MetaPathFinder, Loader):
    """Finds modules of :data:`MOVED`, and everything below them, under their old names."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if _new_name(name) is None else spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_new_name(spec.name) or spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            module.__spec__ = spec.loader_state  # a module keeps the name that it has now


def _new_name(name: str) -> str | None:
    """Return where a module lives now, or None if it is not an old name."""
    if not name.startswith("gradbal."):  # asked about every import of the process
        return None
    old, below = name, ""
    while old not in MOVED:  # the longest old name that it is, or lies in
        old, _, last = old.rpartition(".")
        if not old:
            return None
        below = f".{last}{below}"
    return MOVED[old] + below


def serve_old_paths() -> None:
    """Let imports of old paths succeed.

    They are asked for first: the finder of files would load ``gradbal.compare.report`` a second
    time, from the folder of ``gradbal.lab.compare``.
    """
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
