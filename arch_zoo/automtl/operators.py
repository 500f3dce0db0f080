"""Modules of which tasks have versions of their own."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from arch_zoo.inputs import call

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # batch and instance norms


def is_norm(module: object) -> bool:
    """Return whether it normalises, with parameters or statistics of its own."""
    return isinstance(module, NORMS)


class Pass(NamedTuple):
    """A pass through a network with branches.

    Args:
        task: Whose branches are taken.
        named: Inputs of the batch by name, for operators whose ``forward`` names them.
    """

    task: str
    named: Mapping[str, Any] = {}


class Taking(nn.Module):
    """A module that is handed the named inputs which it takes.

    Args:
        module: Any module.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any, named: Mapping[str, Any]) -> Any:
        return call(self.module, x, named)


class PerTask(nn.Module):
    """A module of which every task has a copy.

    Args:
        specific: The copies, by task.
    """

    def __init__(self, specific: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.specific = nn.ModuleDict(specific)

    def forward(self, x: Tensor, choices: Tensor, given: Pass) -> Tensor:
        """Apply the copy of the task; there is no choice."""
        y: Tensor = self.specific[given.task](x)
        return y

    def taken(self, choices: Sequence[int], task: str) -> str:
        """Return the path from here to what the task takes.

        Args:
            choices: The branch of each operator.
            task: Whose choices these are.
        """
        return f"specific.{task}"

    def reach(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Yield the parts that single tasks reach, with these."""
        for task, copy in self.specific.items():
            yield copy, (task,)


class Operator(PerTask):
    """A searchable module: each task takes the shared one, a copy of its own, or a skip.

    Args:
        index: Its row in the choices.
        shared: The module for all tasks.
        specific: Copies, by task; empty if there are none.
        skips: What leaves it out, by task; empty if nothing fits.
        tasks: All tasks.
    """

    def __init__(
        self,
        index: int,
        shared: nn.Module,
        specific: Mapping[str, nn.Module],
        skips: Mapping[str, nn.Module],
        tasks: Sequence[str],
    ) -> None:
        super().__init__(specific)
        self.tasks = tuple(tasks)
        self.index = index
        self.shared = shared
        self.skips = nn.ModuleDict(skips)

    def forward(self, x: Tensor, choices: Tensor, given: Pass) -> Tensor:
        """Mix the branches of the task.

        Args:
            x: Input.
            choices: Probabilities of the branches of all operators, ``[operators, 3]``.
            given: Whose branches, and the named inputs.
        """
        shares = choices[self.index]
        shared, *others = self.branches(given.task)
        y: Tensor = shares[0] * call(shared, x, given.named)
        for share, branch in zip(shares[1:], others, strict=True):
            y = y if branch is None else y + share * call(branch, x, given.named)
        return y

    def branches(self, task: str) -> tuple[nn.Module, nn.Module | None, nn.Module | None]:
        """Return what the task may take, in the order of the choices; None for no such branch."""
        specific = self.specific[task] if self.specific else None
        skip = self.skips[task] if self.skips else None
        return self.shared, specific, skip

    def taken(self, choices: Sequence[int], task: str) -> str:
        return ("shared", f"specific.{task}", f"skips.{task}")[choices[self.index]]

    def reach(self) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        yield self.shared, self.tasks
        yield from super().reach()
        for task, skip in self.skips.items():
            yield skip, (task,)
