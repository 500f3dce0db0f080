"""A torch optimizer around another one, so that every script and trainer accepts it."""

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch

from gradbal._utils import torch_private
from gradbal._utils.torch_private import GLOBAL_OPTIMIZER_HOOKS, OPTIMIZER_HOOKS


class Facade(torch.optim.Optimizer):
    """A torch optimizer that owns no parameters: it stands before others and passes things on.

    The constructor of ``torch.optim.Optimizer`` is not called: it would build a second set of
    groups. Hooks, labels in the profiler, copies and pickles are as for any optimizer.
    """

    _step_supports_amp_scaling = False  # of the class: GradScaler must not take the base's

    def _init_runtime(self) -> None:
        """Make what is neither saved nor copied."""
        for name in OPTIMIZER_HOOKS:
            self.__dict__.setdefault(name, OrderedDict())
        self.__dict__.setdefault("_warned_capturable_if_run_uncaptured", True)
        self._patch_step_function()

    def _patch_step_function(self) -> None:
        """Put hooks and a profiler's label around ``step`` as torch does, where there are any."""
        super()._patch_step_function()
        kind: Any = type(self)
        labelled = kind.step
        if hasattr(labelled, "bare"):
            return

        @wraps(labelled)
        def step(self: "Facade", *args: Any, **kwargs: Any) -> Any:
            hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
            if hooks or any(GLOBAL_OPTIMIZER_HOOKS) or torch_private.profiler_enabled():
                return labelled(self, *args, **kwargs)
            return step.bare(self, *args, **kwargs)  # type: ignore[attr-defined]

        step.bare = labelled.__wrapped__  # type: ignore[attr-defined]
        kind.step = step

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to go on, tensors and primitives only."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._saved()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one that does not fit changes nothing."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else dict(changed)
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _saved(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Leave out hooks, as torch does, and what a scheduler patched onto this very object."""
        left_out = {*OPTIMIZER_HOOKS, "step", "_opt_called"}
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._init_runtime()


class WrappedOptimizer(Facade):
    """Delegate everything to ``base`` and add the state of ``core`` to the checkpoint.

    ``param_groups``, ``state`` and ``defaults`` are the base's own objects, so schedulers,
    scalers and checkpointing change the one optimizer there is. A plain checkpoint of the base
    loads, too.
    """

    base: torch.optim.Optimizer
    core: Any  # gradbal.core.Core; this module lies below it

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self._init_runtime()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def __getattr__(self, name: str) -> Any:
        """Look up what is not here on the base; never a private name."""
        if name.startswith("_") or name in ("base", "core", "optimizer"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the base optimizer's parameters."""
        self.base.zero_grad(set_to_none=set_to_none)

    def _saved(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "gradbal": self.core.state_dict()}

    def _load(self, state_dict: dict[str, Any]) -> None:
        ours = state_dict.pop("gradbal", None)
        if ours is not None:
            self.core.verify(ours)  # before the base changes
        self.base.load_state_dict(state_dict)
        if ours is not None:
            self.core.load_state_dict(ours)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r})"


def needs_closure(base: torch.optim.Optimizer) -> bool:
    """Say whether a base optimizer cannot step without evaluating the losses itself."""
    closure = inspect.signature(type(base).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
