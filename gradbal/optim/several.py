"""Several optimizers as one: each steps parameters of its own, and all see the same gradients."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import accumulate, count, pairwise
from typing import Any

import torch
from torch import Tensor

from gradbal._utils.checks import OWNER
from gradbal.optim.wrapper import Facade, needs_closure


class SeveralOptimizers(Facade):
    """Step several optimizers in turn, for example Muon for matrices and AdamW for the rest.

    Groups stand optimizer by optimizer, and checkpoints have the form of any torch optimizer's.
    A scheduler that keeps a list with one entry per group wants to be built after the last group
    was added, as for any optimizer.

    Args:
        optimizers: At least one; no parameter may be in two of them.

    Attributes:
        optimizers: The optimizers, in the given order.
        defaults: The options that all of them have, as the first has them.

    Raises:
        TypeError: If one is no torch optimizer.
        ValueError: If there is none, two share a parameter, or one evaluates the losses itself.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        _check(self.optimizers)
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        self.defaults = {k: v for k, v in first.items() if all(k in other for other in others)}
        self._init_runtime()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        for optimizer, groups in zip(self.optimizers, self._shared_out(value), strict=True):
            optimizer.param_groups = groups

    @property  # type: ignore[override]  # torch's is a dict
    def state(self) -> MutableMapping[Tensor, Any]:
        return _States(self.optimizers)

    @state.setter
    def state(self, value: Mapping[Tensor, Any]) -> None:
        new = value if isinstance(value, _States) else _States(self.optimizers, fresh=True)
        if new is not value:
            new.update(value)
        for optimizer, part in zip(self.optimizers, new.parts, strict=True):
            optimizer.state = part

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to one of the optimizers.

        Args:
            param_group: As for any optimizer, and under ``"optimizer"`` the number of the one
                that it goes to.

        Raises:
            ValueError: If there is no such number.
        """
        options = dict(param_group)
        number = options.pop("optimizer", None)
        if type(number) is not int or not 0 <= number < len(self.optimizers):
            raise ValueError(
                f"{OWNER}: a group for one of {len(self.optimizers)} optimizers must say to which "
                f"it goes, as in {{'params': ..., 'optimizer': 0}}; got optimizer={number!r}."
            )
        self.optimizers[number].add_param_group(options)
        try:
            _check(self.optimizers)
        except ValueError:
            del self.optimizers[number].param_groups[-1]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every optimizer once; a closure is evaluated once, before the first."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return value

    def _saved(self) -> dict[str, Any]:
        """Join the checkpoints, with the parameters numbered on from one to the next."""
        joined: dict[str, Any] = {"state": {}, "param_groups": []}
        following = count()
        for part in (optimizer.state_dict() for optimizer in self.optimizers):
            new = {n: next(following) for group in part["param_groups"] for n in group["params"]}
            joined["state"] |= {new[n]: kept for n, kept in part["state"].items()}
            joined["param_groups"] += [
                {**group, "params": [new[n] for n in group["params"]]}
                for group in part["param_groups"]
            ]
        return joined

    def _load(self, state_dict: dict[str, Any]) -> None:
        shared_out = self._shared_out(state_dict["param_groups"])
        for optimizer, groups in zip(self.optimizers, shared_out, strict=True):
            theirs = {number for group in groups for number in group["params"]}
            state = {n: kept for n, kept in state_dict["state"].items() if n in theirs}
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _shared_out(self, groups: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """Return the groups of each optimizer.

        Raises:
            ValueError: If they do not fit.
        """
        sizes = [len(group["params"]) for group in groups]
        expected = [len(group["params"]) for group in self.param_groups]
        if sizes != expected:
            raise ValueError(
                f"Checkpoint: its groups have {sizes} parameters, those of these optimizers "
                f"{expected}; build them as they were when it was saved."
            )
        ends = list(accumulate(len(optimizer.param_groups) for optimizer in self.optimizers))
        return [list(groups[a:b]) for a, b in pairwise([0, *ends])]

    def __repr__(self) -> str:
        return f"SeveralOptimizers({', '.join(map(repr, self.optimizers))})"


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers as one: what is written reaches the one that owns it."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], *, fresh: bool = False) -> None:
        self.optimizers = optimizers
        self.parts = [defaultdict(dict) if fresh else o.state for o in optimizers]

    def __getitem__(self, param: Tensor) -> Any:
        return self._of(param)[param]

    def __setitem__(self, param: Tensor, value: Any) -> None:
        self._of(param)[param] = value

    def __delitem__(self, param: Tensor) -> None:
        del self._of(param)[param]

    def __contains__(self, param: object) -> bool:
        return any(param in part for part in self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return (param for part in self.parts for param in part)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def _of(self, param: Tensor) -> defaultdict[Tensor, Any]:
        """Return the state of the optimizer that has this parameter."""
        for optimizer, part in zip(self.optimizers, self.parts, strict=True):
            if any(param is own for group in optimizer.param_groups for own in group["params"]):
                return part
        raise KeyError(param)


def _check(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raise the sentence that says why these cannot be stepped as one."""
    if not optimizers:
        raise ValueError(f"{OWNER}: expected at least one torch optimizer, got an empty list.")
    seen: dict[int, str] = {}
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer) or isinstance(optimizer, Facade):
            raise TypeError(f"{OWNER}: expected plain torch optimizers, got {optimizer!r}.")
        name = type(optimizer).__name__
        if needs_closure(optimizer):
            raise ValueError(
                f"{OWNER}: {name} evaluates the losses several times in a step, so it cannot be "
                "one of several optimizers; wrap it alone."
            )
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            if id(param) in seen:
                raise ValueError(
                    f"{OWNER}: {seen[id(param)]} and {name} share a parameter, which would be "
                    "stepped twice; give each parameter to one optimizer."
                )
        own = {id(param) for group in optimizer.param_groups for param in group["params"]}
        seen |= dict.fromkeys(own, name)
