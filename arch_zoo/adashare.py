"""AdaShare: every task runs or skips each block of one shared network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.automtl.policy import Policy
from arch_zoo.automtl.supermodel import AutoMTL
from arch_zoo.model import Heads


@dataclass(frozen=True)
class RunOrSkip:
    r"""Penalties on logits: for running a block, and for running another one than other tasks do.

    With logits `a` of running and the probability `p` of it, for blocks `l` of `L`,

    .. math:: \lambda_1 \sum_t \frac1L \sum_l -\log (1 - p_{tl})
        + \lambda_2 \sum_{s < t} \sum_l w_l |a_{sl} - a_{tl}|

    over the blocks that are free, with `l` from 0. The published code weighs upper blocks more,
    :math:`w_l = (l + 1) / L`; the other way is :math:`(L - l) / L`.

    Args:
        sparsity: Weight :math:`\lambda_1`; ``>= 0``.
        sharing: Weight :math:`\lambda_2`; ``>= 0``.
        upper: Weigh upper blocks more.

    Raises:
        ValueError: If a weight is negative.
    """

    sparsity: float = 0.05
    sharing: float = 0.05
    upper: bool = True

    def __post_init__(self) -> None:
        for name in ("sparsity", "sharing"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"RunOrSkip: `{name}` must be >= 0, got {getattr(self, name)}.")

    def __call__(self, probabilities: Mapping[str, Tensor], policy: Policy) -> Tensor:
        """Return the penalty, without dimensions.

        Args:
            probabilities: Tells by its keys the tasks that count.
            policy: Has the logits.
        """
        free = policy.free & policy.legal[:, 2]
        logits = {task: policy.logits[task][:, [0, 2]] for task in probabilities}
        skip = torch.stack([a.log_softmax(-1)[free, 1] for a in logits.values()])
        count = free.sum().clamp(min=1)
        total = -self.sparsity * skip.sum() / count
        n = len(free)
        place = torch.arange(n, device=free.device)
        weights = ((place + 1) if self.upper else (n - place)) / n
        for one, other in combinations(logits.values(), 2):
            gap = (one[:, 0] - other[:, 0]).abs()
            total = total + self.sharing * (weights * gap)[free].sum()
        return total


class AdaShare(AutoMTL):
    """A shared network of blocks, each of which every task runs or skips, to be searched.

    It is :class:`AutoMTL` without copies: a task mixes each block and the identity as one sample of
    the policy says, and in evaluation runs the likelier of both. Blocks that change shapes always
    run. :meth:`lower` returns the network that is left, ``policy.free_last(n)`` keeps all but the
    last blocks running at the start of a search, and :mod:`arch_zoo.automtl.stages` has its steps.

    Args:
        blocks: The network: residual blocks, and what changes shapes between them.
        heads: One module per task, which reads the last block's output.
        example_input: A batch of the usual kind.
        regulariser: By default ``RunOrSkip()``.
        options: Those of :class:`AutoMTL`, such as ``tau``.

    Raises:
        TypeError: If the blocks are no modules.
        ValueError: As :class:`AutoMTL`, or if no block can be skipped.

    Source:
        Sun et al., AdaShare: Learning What To Share For Efficient Deep Multi-Task Learning,
        NeurIPS 2020. The norms of a block are shared until it is lowered.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(4, 4)
        ...
        ...     def forward(self, x):
        ...         return x + self.linear(x)
        >>> heads = {"depth": nn.Linear(4, 1), "normal": nn.Linear(4, 3)}
        >>> model = AdaShare([nn.Linear(3, 4), Block(), Block()], heads, torch.ones(2, 3))
        >>> model.policy.legal[:, 2].tolist()
        [False, True, True]
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        heads: Heads,
        example_input: Tensor,
        *,
        regulariser: RunOrSkip | None = None,
        **options: Any,  # of AutoMTL
    ) -> None:
        super().__init__(
            blocks,
            heads,
            example_input,
            branches=("skip",),
            regulariser=RunOrSkip() if regulariser is None else regulariser,
            **options,
        )
        if not bool(self.policy.legal[:, 2].any()):
            raise ValueError(
                "AdaShare: `blocks` must hold at least one that keeps its shape, got none that a "
                "task may skip."
            )
