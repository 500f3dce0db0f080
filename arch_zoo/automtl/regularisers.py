"""What makes tasks share: functions of the probabilities of branches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from arch_zoo.automtl.policy import Policy

Regulariser: TypeAlias = Callable[[Mapping[str, Tensor], Policy], Tensor]


@dataclass(frozen=True)
class DepthWeighted:
    r"""The published one: it prefers the shared branch, most of all near the input.

    .. math::
        \sum_{t, n} \tfrac{D - d_n}{D} \bigl[\operatorname{softplus}(s (p_1 - p_0))
        + \operatorname{softplus}(s (p_2 - p_0))\bigr]

    for operators `n` of depth `d_n`, at most `D`; the deepest ones are left alone.

    Args:
        scale: Steepness `s`; positive. The published code documents 1 and trains with 6.

    Raises:
        ValueError: If the scale is not positive.

    Source:
        Zhang et al., AutoMTL, NeurIPS 2022, its code.

    Example:
        >>> ones = torch.ones(2, 3)
        >>> policy = Policy(["depth"], ones > 0, torch.tensor([1.0, 2.0]), ones, ones)
        >>> DepthWeighted(scale=1.0)({"depth": ones / 3}, policy)  # log 2, and 0 at the end
        tensor(0.6931)
    """

    scale: float = 6.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"DepthWeighted: `scale` must be > 0, got {self.scale}.")

    def __call__(self, probabilities: Mapping[str, Tensor], policy: Policy) -> Tensor:
        """Return the sum over tasks and operators, without dimensions.

        Args:
            probabilities: Of the branches, ``[operators, 3]`` by task.
            policy: Knows the depths.
        """
        shared, *others = torch.stack(list(probabilities.values())).unbind(dim=-1)
        terms = [functional.softplus(self.scale * (other - shared)) for other in others]
        deepest = policy.depth.max()
        return ((deepest - policy.depth) / deepest * torch.stack(terms)).sum()


@dataclass(frozen=True)
class ExpectedCost:
    r"""The expected cost of the operators, as a share of what one network per task costs.

    A shared operator counts once, as likely as one task at least takes it, for branches drawn
    independently. For operations this is a lower bound: tasks that share an operator run it
    together only if all before it is shared, too.

    Args:
        of: ``"parameters"`` or ``"operations"``, the multiply-adds on one example.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> ones = torch.ones(1, 3)
        >>> policy = Policy(["depth", "normal"], ones > 0, ones[0], ones, ones)
        >>> ExpectedCost()(policy.argmax(), policy)  # all shared: one network instead of two
        tensor(0.5000)
    """

    of: str = "parameters"

    def __post_init__(self) -> None:
        if self.of not in ("parameters", "operations"):
            raise ValueError(
                f"ExpectedCost: `of` must be 'parameters' or 'operations', got {self.of!r}."
            )

    def __call__(self, probabilities: Mapping[str, Tensor], policy: Policy) -> Tensor:
        """Return the share, without dimensions.

        Args:
            probabilities: Of the branches, ``[operators, 3]`` by task.
            policy: Knows the costs.
        """
        costs = policy.sizes if self.of == "parameters" else policy.operations
        shared, specific, skip = costs.unbind(dim=-1)
        p_shared, p_specific, p_skip = torch.stack(list(probabilities.values())).unbind(dim=-1)
        expected = (1 - (1 - p_shared).prod(dim=0)) * shared + (
            p_specific * specific + p_skip * skip
        ).sum(dim=0)
        return expected.sum() / (len(probabilities) * shared.sum())
