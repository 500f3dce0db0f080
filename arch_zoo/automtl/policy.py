"""What each task does with each operator: logits, samples and what is known of the operators."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

Choices: TypeAlias = dict[str, Tensor]

BRANCHES = ("shared", "specific", "skip")


class Temperature(nn.Module):
    r"""A falling temperature, :math:`a f^{\lfloor n / k \rfloor}` after `n` steps.

    The number of steps is a buffer, so it is saved and loaded with the model.

    Args:
        start: Temperature `a` before the first step; positive.
        factor: What it is multiplied by, `f`; above 0, at most 1.
        every: Steps between two such times, `k`. The published code waits for more than 100.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> tau = Temperature(start=4.0, factor=0.5, every=2)
        >>> for _ in range(5):
        ...     tau.step()
        >>> tau().item()
        1.0
    """

    steps: Tensor

    def __init__(self, start: float = 5.0, factor: float = 0.965, every: int = 101) -> None:
        super().__init__()
        if not (start > 0 and math.isfinite(start)):
            raise ValueError(f"Temperature: `start` must be finite and > 0, got {start}.")
        if not 0 < factor <= 1:
            raise ValueError(f"Temperature: `factor` must be above 0 and at most 1, got {factor}.")
        if every < 1:
            raise ValueError(f"Temperature: `every` must be >= 1, got {every}.")
        self.start = start
        self.factor = factor
        self.every = every
        self.register_buffer("steps", torch.tensor(0))

    def forward(self) -> Tensor:
        """Return the temperature, without dimensions."""
        return self.start * self.factor ** (self.steps // self.every)

    def step(self) -> None:
        """Count a step of the policy."""
        self.steps += 1


class Policy(nn.Module):
    """Logits of the branches, one row ``(shared, specific, skip)`` per operator, for each task.

    Every task has a tensor of its own, so that each serves one task only.

    Args:
        tasks: All tasks.
        legal: The branches that an operator has, ``[operators, 3]`` bool.
        depth: Length of the longest chain of operators from the input to each, itself included,
            ``[operators]``.
        sizes: Number of parameters of each branch, ``[operators, 3]``.
        operations: Multiply-adds of each branch on one example, ``[operators, 3]``.
        tau: Returns the temperature of the samples when called; by default ``Temperature()``.

    At first tasks choose for all operators; :meth:`free_last` limits the choice to the last ones.

    Example:
        >>> legal, ones = torch.tensor([[True, True, False]]), torch.ones(1, 3)
        >>> policy = Policy(["depth", "normal"], legal, torch.ones(1), ones, ones)
        >>> policy.uniform()["depth"]
        tensor([[0.5000, 0.5000, 0.0000]])
        >>> policy.logits["depth"].data[0, 1] = 2.0
        >>> policy.argmax()
        {'depth': tensor([[0., 1., 0.]]), 'normal': tensor([[1., 0., 0.]])}
    """

    legal: Tensor
    depth: Tensor
    sizes: Tensor
    operations: Tensor
    free: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        legal: Tensor,
        depth: Tensor,
        sizes: Tensor,
        operations: Tensor,
        tau: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, known in (
            ("legal", legal),
            ("depth", depth),
            ("sizes", sizes),
            ("operations", operations),
        ):
            self.register_buffer(name, known, persistent=False)
        self.register_buffer("free", torch.ones(len(legal), dtype=torch.bool), persistent=False)
        self.tau = Temperature() if tau is None else tau
        self.logits = nn.ParameterDict({t: nn.Parameter(torch.zeros(legal.shape)) for t in tasks})

    def sample(self, generator: torch.Generator | None = None, hard: bool = False) -> Choices:
        """Return Gumbel-softmax samples at the present temperature, ``[operators, 3]`` by task.

        Args:
            generator: Source of the noise; by default the global one.
            hard: Return one-hot rows, with the gradient of the soft ones.
        """
        tau = self.tau()
        soft = {
            task: torch.softmax((scores + _gumbel(scores, generator)) / tau, dim=-1)
            for task, scores in self._scores()
        }
        return {t: _one_hot(p) + (p - p.detach()) for t, p in soft.items()} if hard else soft

    def draw(self, generator: torch.Generator | None = None) -> Choices:
        """Return one-hot draws from the softmax of the logits, without temperature, by task."""
        with torch.no_grad():
            return {task: _one_hot(s + _gumbel(s, generator)) for task, s in self._scores()}

    def argmax(self) -> Choices:
        """Return one-hot rows of the likeliest branches by task; the first of equal ones."""
        with torch.no_grad():
            return {task: _one_hot(scores) for task, scores in self._scores()}

    def uniform(self) -> Choices:
        """Return rows that take the mean of all legal branches, by task."""
        with torch.no_grad():
            return {
                task: torch.softmax(scores.masked_fill(scores > -math.inf, 0), dim=-1)
                for task, scores in self._scores()
            }

    def entropy(self) -> Choices:
        """Return how undecided each row is: the entropy of its softmax in nats, by task."""
        with torch.no_grad():
            return {
                task: torch.special.entr(torch.softmax(scores, dim=-1)).sum(dim=-1)
                for task, scores in self._scores()
            }

    def free_last(self, n: int) -> None:
        """Let tasks choose for the last ``n`` operators alone and share the others.

        A search that starts with few of them and frees more and more is the curriculum of AdaShare.

        Raises:
            ValueError: If the number is negative.
        """
        if n < 0:
            raise ValueError(f"Policy: `n` must be >= 0, got {n}.")
        self.free.copy_(torch.arange(len(self.free)) >= len(self.free) - n)

    def _scores(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the logits by task, those of illegal branches at minus infinity."""
        bound = torch.zeros_like(self.legal)
        bound[:, 1:] = ~self.free.unsqueeze(1)
        for task, logits in self.logits.items():
            yield task, logits.masked_fill(~self.legal | bound, -math.inf)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard Gumbel noise of this shape, the same on all devices for one generator."""
    device = like.device if generator is None else generator.device
    noise = torch.empty_like(like, device=device).exponential_(generator=generator)
    return -noise.log().to(like.device)


def _one_hot(scores: Tensor) -> Tensor:
    """Return rows with a one at the largest score, ``[operators, 3]``."""
    return functional.one_hot(scores.argmax(dim=-1), len(BRANCHES)).to(scores.dtype)
