"""Modules of which tasks have versions of their own."""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)  # batch and instance norms


def is_norm(module: object) -> bool:
    """Return whether it normalises, with parameters or statistics of its own."""
    return isinstance(module, NORMS)


class PerTask(nn.Module):
    """A module of which every task has a copy.

    Args:
        specific: The copies, by task.
    """

    def __init__(self, specific: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.specific = nn.ModuleDict(specific)

    def forward(self, x: Tensor, choices: Tensor, task: str) -> Tensor:
        """Apply the copy of the task; there is no choice."""
        y: Tensor = self.specific[task](x)
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

    def forward(self, x: Tensor, choices: Tensor, task: str) -> Tensor:
        """Mix the branches of the task.

        Args:
            x: Input.
            choices: Probabilities of the branches of all operators, ``[operators, 3]``.
            task: Whose branches.
        """
        shares = choices[self.index]
        shared, *others = self.branches(task)
        y: Tensor = shares[0] * shared(x)
        for share, branch in zip(shares[1:], others, strict=True):
            y = y if branch is None else y + share * branch(x)
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
