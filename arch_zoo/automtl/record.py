"""What a search looks at, and what it has seen."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from math import inf, isnan
from typing import Any

from torch import Tensor, nn

from arch_zoo.automtl.checkpoint import Loader


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training examples, as functions from the number of a pass to its batches.

    The same number must give the same batches, so seed their order with it: a search that goes on
    after an interruption leaves out those that it has seen.

    Args:
        train: All training examples, for the first and the last stage.
        weights: The part of them from which the search learns weights.
        policy: The other part, from which it learns the policy.
    """

    train: Loader
    weights: Loader
    policy: Loader


@dataclass
class Record:
    """What a search saw.

    Args:
        course: At each look while searching, by task the mean probabilities of shared, specific and
            skip over all operators.
        policy: The branch of every operator by task: 0 shared, 1 specific, 2 skip.
        candidates: Validation figures of the policies that were drawn; none for the likeliest.
        inherited: Whether the last stage started from the weights of the search.
        curve: Validation figure at each look in the last stage.
        best: The step of the last stage whose weights were kept.
    """

    course: list[dict[str, list[float]]] = field(default_factory=list)
    policy: dict[str, list[int]] = field(default_factory=dict)
    candidates: list[float] = field(default_factory=list)
    inherited: bool = False
    curve: list[float] = field(default_factory=list)
    best: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        vars(self).update(state_dict)


@dataclass
class Best:
    """The weights with the best figure so far; a NaN is worse than any other."""

    figure: float = -inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    def offer(self, figure: float, model: nn.Module) -> bool:
        """Keep the weights of a model if its figure is better; return whether it is."""
        better = not self.weights or figure > self.figure
        if better:
            self.figure = -inf if isnan(figure) else figure
            self.weights = deepcopy(model.state_dict())
        return better

    def state_dict(self) -> dict[str, Any]:
        return vars(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        vars(self).update(state_dict)
