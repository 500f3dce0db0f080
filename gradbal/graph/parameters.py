"""What the parameters are to the tasks: shared, counted, grouped."""

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradbal._utils.checks import OWNER
from gradbal._utils.dtensor import is_sharded, local
from gradbal.graph.walk import members, several

Parameters = nn.Module | Tensor | Iterable[Any]
Groups = Literal["model", "tensor"] | Mapping[str, Parameters]

MODEL = "model"  # the group of everything
BESIDE = "beside"  # what takes the weights of everything and has no part in them


class Roles:
    """The parameters of an optimizer, numbered in the order of its groups.

    Args:
        base: Whose parameters count.
        shared: Those to treat as shared; None to find them.
        groups: How shared ones are grouped.
        over: Those over which inner products are taken; None for all shared ones.
        everything: Treat all as shared.

    Attributes:
        params: The parameters.
        held: What this process holds of each.
        shards: Numbers of those of which it may hold a part only.
        index: The number of each, by ``id``.
    """

    def __init__(
        self,
        base: torch.optim.Optimizer,
        shared: Sequence[Tensor] | None,
        groups: Groups,
        over: Sequence[Tensor] | None,
        *,
        everything: bool,
    ) -> None:
        self.base, self.groups, self.everything = base, groups, everything
        self.params: list[Tensor] = []
        self.held: list[Tensor] = []
        self.shards: set[int] = set()
        self.index: dict[int, int] = {}
        self.grouped: dict[int, str] = {}
        self._shared: set[int] | None = None
        self._over: set[int] | None = None
        self._known: Mapping[int, int] = {}  # tasks of each parameter in the step before
        self._common: set[int] = set()  # those of several tasks among them
        self.refresh()
        if shared is not None and not everything:
            self._shared = numbers_in(shared, self.index)
        if over is not None:
            self._over = numbers_in(over, self.index)
        assign_groups(groups, (), self.index)  # raises now if a group names strangers

    def refresh(self) -> dict[int, int] | None:
        """Notice parameters that joined, left or were replaced.

        Returns:
            The new number of each old parameter that is still there, or None if all stand where
            they stood.
        """
        params = parameter_list(self.base)
        if len(params) == len(self.params) and all(map(is_, params, self.params)):
            return None
        old, self.params = self.params, params
        self.shards = {n for n, param in enumerate(params) if is_sharded(param)}
        self.held = [local(p) if n in self.shards else p for n, p in enumerate(params)]
        self.index = {id(param): number for number, param in enumerate(params)}
        self.grouped = {}
        moved = {n: self.index[id(p)] for n, p in enumerate(old) if id(p) in self.index}
        if self.everything:
            self._shared = set(self.index.values())
        elif self._shared is not None:
            self._shared = {moved[number] for number in self._shared if number in moved}
        if self._over is not None:
            self._over = {moved[number] for number in self._over if number in moved}
        return moved

    @property
    def named(self) -> set[int] | None:
        """The parameters to treat as shared, or None if they are to be found."""
        return self._shared

    @property
    def some(self) -> bool:
        """Whether inner products are taken over some of the shared parameters only."""
        return self._over is not None

    def shared(self, known: Mapping[int, int]) -> set[int]:
        """Return the parameters that are shared, now or by what was seen before."""
        if self._shared is not None:
            return self._shared
        if known != self._known:
            self._known = dict(known)
            self._common = {number for number, tasks in known.items() if several(tasks)}
        return self._common

    def group(self, shared: set[int]) -> dict[int, str]:
        """Return the group of each shared parameter."""
        if self.grouped.keys() != shared:
            self.grouped = assign_groups(self.groups, sorted(shared), self.index)
            if self._over is not None:
                self.grouped = {n: MODEL if n in self._over else BESIDE for n in self.grouped}
        return self.grouped

    def members(
        self, tasks: Sequence[int], reached: Mapping[int, int], shared: set[int], *, one: bool
    ) -> dict[str, list[int]]:
        """Return which of these tasks reach each group of shared parameters, by position.

        Args:
            tasks: Numbers of the tasks.
            reached: The tasks that reach each parameter, as a bit set.
            shared: The shared parameters.
            one: Take all groups for one.
        """
        sets: dict[str, int] = {}
        pairs = {
            (MODEL if one else self.grouped[number], bits)
            for number, bits in reached.items()
            if number in shared
        }
        for group, bits in pairs:
            sets[group] = sets.get(group, 0) | bits
        position = {task: i for i, task in enumerate(tasks)}
        found = {g: sorted(position[task] for task in members(bits)) for g, bits in sets.items()}
        return dict(sorted(found.items()))

    def check_counted(self, shared: set[int], reached: Mapping[int, int]) -> None:
        """Raise if inner products are to be taken over parameters that nothing shares."""
        if self._over is not None and not self._over & shared & reached.keys():
            raise RuntimeError(
                "MTLOptimizer: the losses share none of the parameters in `gram_over`, so there is "
                "nothing to compare; name modules that several tasks use."
            )


def parameter_list(base: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters of the optimizer, each once, in the order of its groups."""
    params = [param for group in base.param_groups for param in group["params"]]
    return list({id(param): param for param in params}.values())


def tensors_of(parameters: Parameters) -> list[Tensor]:
    """Return the parameters in a module, a tensor or nested iterables of these.

    Raises:
        TypeError: If something else comes.
    """
    if isinstance(parameters, nn.Module):
        return list(parameters.parameters())
    if isinstance(parameters, Tensor):
        return [parameters]
    if isinstance(parameters, str | bytes) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{OWNER}: expected a module, parameters or a list of these, got {parameters!r}."
        )
    return [tensor for part in parameters for tensor in tensors_of(part)]


def numbers_in(parameters: Parameters, index: Mapping[int, int]) -> set[int]:
    """Return the numbers of these parameters among those of the optimizer.

    Raises:
        ValueError: If none of them belongs to the optimizer.
    """
    tensors = tensors_of(parameters)
    numbers = {index[id(tensor)] for tensor in tensors if id(tensor) in index}
    if not numbers:
        raise ValueError(
            f"{OWNER}: none of the {len(tensors)} parameters named in `shared`, `groups` or "
            "`gram_over` belongs to the base optimizer; name parameters that it was built with."
        )
    return numbers


def assign_groups(
    groups: Groups, numbers: Sequence[int], index: Mapping[int, int]
) -> dict[int, str]:
    """Return the group of each shared parameter; those that no group names form ``"other"``."""
    if not isinstance(groups, Mapping):
        return {n: "model" if groups == "model" else f"tensor {n}" for n in numbers}
    named: dict[int, str] = {}
    for name, part in groups.items():
        for number in numbers_in(part, index):
            if number in named:
                raise ValueError(
                    f"{OWNER}: parameter {number} is in the groups {named[number]!r} and {name!r}; "
                    "each may be in one."
                )
            named[number] = name
    return {n: named.get(n, "other") for n in numbers}
