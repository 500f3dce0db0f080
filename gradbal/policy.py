"""How weights are applied, and to which of the tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradbal.rule import Direction, Rule, Weights


@dataclass(frozen=True)
class Policy:
    """How weights are applied.

    Attributes:
        scale: ``"sum"`` brings mean-like rules to the length of the summed gradient.
        heads: ``"plain"``, ``"weighted"``, or None for the rule's own way.
        capturable: Whether nothing may be read back.
    """

    scale: str = "native"
    heads: str | None = None
    capturable: bool = False

    def factor(self, rule: Rule, n_tasks: int) -> int:
        """Return what the rule's weights are multiplied by."""
        return n_tasks if self.scale == "sum" and rule.scale == "mean" else 1

    def split(self, rule: Rule, result: Tensor | Weights) -> tuple[Tensor, Tensor | None]:
        """Return the weights on shared parameters, and those on heads or None for plain."""
        shared, heads = result if isinstance(result, Weights) else (result, None)
        factor = self.factor(rule, len(shared))
        shared = shared if factor == 1 else shared * factor
        if self.heads == "plain":
            return shared, None
        if heads is not None:
            return shared, heads
        return shared, shared if (self.heads or rule.heads) == "weighted" else None

    def split_direction(
        self,
        rule: Rule,
        result: Sequence[Tensor] | Direction,
        n_tasks: int,
        scale: Tensor | None,
    ) -> tuple[Sequence[Tensor], Tensor | None]:
        """Return a direction brought to length, and the weights on heads or None for plain."""
        shared, heads = result if isinstance(result, Direction) else (result, None)
        factor = self.factor(rule, n_tasks)
        if scale is not None:
            shared = [part * (factor * scale) for part in shared]
        elif factor != 1:
            shared = [part * factor for part in shared]
        return shared, None if self.heads == "plain" else heads


@dataclass
class Part:
    """Some of the present tasks."""

    tasks: Sequence[int]
    positions: Sequence[int]
    device: torch.device

    def __post_init__(self) -> None:
        self.numbers = [self.tasks[i] for i in self.positions]
        self.whole = len(self.positions) == len(self.tasks)
        self.index = None if self.whole else torch.tensor(self.positions, device=self.device)

    def pick(self, vector: Tensor) -> Tensor:
        return vector if self.index is None else vector[self.index]

    def pick_square(self, matrix: Tensor) -> Tensor:
        return matrix if self.index is None else matrix[..., self.index[:, None], self.index]

    def spread(self, vector: Tensor, default: float) -> Tensor:
        if self.index is None:
            return vector
        return vector.new_full((len(self.tasks),), default).index_copy(0, self.index, vector)
