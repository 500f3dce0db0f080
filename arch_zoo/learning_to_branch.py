"""Learning to branch: every node of a stage chooses whose output it reads; a tree remains."""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.encoders import Encoder, copies_of, parts_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach
from arch_zoo.tensors import mix, stack
from arch_zoo.tree import Tree


class Schedule(nn.Module):
    r"""A falling temperature, :math:`\max(b, a / \sqrt{1 + n})` after `n` steps.

    The number of steps is a buffer, so it is saved and loaded with the model.

    Args:
        start: Temperature `a` before the first step; positive.
        floor: Lowest temperature `b`; positive.
        warmup: Steps before the first one that counts, in which weights learn and choices do not:
            every node takes the mean of all below it.

    Raises:
        ValueError: If a temperature is not positive, or the warm-up negative.

    Example:
        >>> tau = Schedule(start=4.0, floor=0.5)
        >>> for _ in range(3):
        ...     tau.step()
        >>> tau().item()
        2.0
    """

    steps: Tensor

    def __init__(self, start: float = 5.0, floor: float = 0.5, warmup: int = 0) -> None:
        super().__init__()
        if warmup < 0:
            raise ValueError(f"Schedule: `warmup` must be >= 0, got {warmup}.")
        for name, value in (("start", start), ("floor", floor)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Schedule: `{name}` must be finite and > 0, got {value}.")
        self.start = start
        self.floor = floor
        self.warmup = warmup
        self.register_buffer("steps", torch.tensor(0))

    def forward(self) -> Tensor:
        """Return the temperature, without dimensions."""
        counted = (self.steps - self.warmup).clamp(min=0)
        return (self.start / (1 + counted).sqrt()).clamp(min=self.floor)

    def warming(self) -> Tensor:
        """Return whether the warm-up is still running, a 0-dim bool tensor."""
        return self.steps < self.warmup

    def step(self) -> None:
        """Count a training step."""
        self.steps += 1


class Choice(nn.Module):
    """Which parent each child reads: sampled in training, the likeliest one in evaluation.

    Args:
        children: Number of children.
        parents: Number of parents.
        hard: Sample one parent, with the gradient of a soft sample; else mix parents softly.
    """

    def __init__(self, children: int, parents: int, hard: bool) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(children, parents))
        self.hard = hard

    def forward(self, tau: Tensor, warming: Tensor | None = None) -> Tensor:
        """Return weights of the parents, shape ``[children, parents]``.

        Args:
            tau: Temperature of the sample in training.
            warming: Whether all parents count alike in training; by default they do not.
        """
        if self.training:
            # `tau` divides as a tensor too, whatever its annotation says
            drawn = functional.gumbel_softmax(self.logits, tau, self.hard)  # type: ignore[arg-type]
            if warming is None:
                return drawn
            return torch.where(warming, torch.full_like(drawn, 1 / drawn.shape[-1]), drawn)
        likeliest = self.logits.argmax(dim=-1)
        return functional.one_hot(likeliest, self.logits.shape[-1]).to(self.logits.dtype)


class LearningToBranch(MultiTaskModel):
    """A supernet whose nodes each read one node of the stage below, and a tree in the end.

    Every stage has candidate nodes; each node, and each head, samples the node it reads, once per
    forward pass for all batches. In training, all nodes run and every task reaches all of them. In
    evaluation the likeliest parents are read, without sampling. Call ``model.tau.step()`` after
    each training step, and :meth:`lower` in the end to drop all that no head reads. With
    ``tau=Schedule(warmup=n)`` the weights learn alone for `n` steps, under the mean of all parents,
    before choices are sampled and learn.

    Args:
        stages: What makes the candidates: a list of factories, one per stage; a factory of all
            stages; or stages to copy, so that all candidates start alike.
        heads: One module per task, which reads a node of the last stage.
        nodes_per_stage: Number of candidates, one for all stages or one for each; by default as
            many as tasks.
        tau: Temperature of the samples; by default ``Schedule()``.
        hard: Sample one parent, with the gradient of a soft sample; else mix parents softly.

    Raises:
        TypeError: If the stages are no encoder.
        ValueError: If a stage has no node, the stages are a network in one piece, or the heads
            cannot be named; in a forward pass, if the outputs of the nodes of a stage differ in
            shape.

    Source:
        Guo et al., Learning to Branch for Multi-Task Learning, ICML 2020. Heads are children
        too here, so that any tree can come out; the temperatures are ours, and the warm-up averages
        parents, where LibMTL's adds them up.

    Example:
        >>> heads = {"depth": nn.Linear(8, 1), "normal": nn.Linear(8, 3)}
        >>> model = LearningToBranch([lambda: nn.Linear(4, 8), lambda: nn.Linear(8, 8)], heads)
        >>> model.paths()
        {'depth': (0, 0), 'normal': (0, 0)}
        >>> sum(p.numel() for p in model.lower().shared_parameters()) == 5 * 8 + 9 * 8
        True
    """

    def __init__(
        self,
        stages: Encoder,
        heads: Heads,
        *,
        nodes_per_stage: int | Sequence[int] | None = None,
        tau: Schedule | None = None,
        hard: bool = True,
    ) -> None:
        super().__init__(heads)
        wanted = len(self.streams) if nodes_per_stage is None else nodes_per_stage
        most = wanted if isinstance(wanted, int) else max(wanted, default=1)
        several = len(self.streams) > 1
        copies = copies_of(self._owner, "stages", stages, max(1, most), several)
        sizes = [wanted] * len(copies[0]) if isinstance(wanted, int) else list(wanted)
        if len(sizes) != len(copies[0]) or min(sizes) < 1:
            raise ValueError(
                "LearningToBranch: `nodes_per_stage` must be >= 1 for each of the "
                f"{len(copies[0])} stages, got {nodes_per_stage}."
            )
        self.tau = Schedule() if tau is None else tau
        self.nodes = nn.ModuleList(
            nn.ModuleList(copy[depth] for copy in copies[:n]) for depth, n in enumerate(sizes)
        )
        self.choices = nn.ModuleList(Choice(n, below, hard) for below, n in pairwise(sizes))
        self.head_choices = nn.ModuleDict({t: Choice(1, sizes[-1], hard) for t in self.streams})

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        tau, warming = self.tau(), self._warming()
        routes = [choice(tau, warming) for choice in self.choices]
        return self.by_batch(partial(self._encode, tau, warming, routes), tasks, x, named)

    def receivers(self) -> Iterator[nn.Module]:
        for nodes in self.nodes:
            yield from parts_of(nodes)

    def reach(self) -> Reach:
        yield self.nodes, self.streams
        yield self.choices, self.streams
        for name, choice in self.head_choices.items():
            yield choice, (name,)

    def architecture_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.choices.parameters()
        yield from self.head_choices.parameters()

    def paths(self) -> dict[str, tuple[int, ...]]:
        """Return for each task the node of each stage on its likeliest path."""
        above = [choice.logits.argmax(dim=-1).tolist() for choice in _choices(self.choices)]
        paths = {}
        for name, choice in zip(self.streams, _choices(self.head_choices), strict=True):
            path = [int(choice.logits.argmax())]
            for parents in reversed(above):
                path.insert(0, parents[path[0]])
            paths[name] = tuple(path)
        return paths

    def lower(self) -> Tree:
        """Return a copy of what the likeliest paths use: a tree that computes as `eval` does."""
        paths = self.paths()
        stages = []
        for depth, nodes in enumerate(self.nodes):
            used = sorted({path[depth] for path in paths.values()})
            stages.append({i: deepcopy(nodes.get_submodule(str(i))) for i in used})
        return Tree(stages, self._copied_heads(), paths)

    def _warming(self) -> Tensor | None:
        """Return whether the warm-up is still running; None if the schedule has no warm-up."""
        has_one = isinstance(self.tau, Schedule) and self.tau.warmup > 0
        return self.tau.warming() if has_one else None

    def _encode(
        self,
        tau: Tensor,
        warming: Tensor | None,
        routes: list[Tensor],
        tasks: tuple[str, ...],
        x: Inputs,
        **named: Inputs,
    ) -> Features:
        below = x
        for depth, nodes in enumerate(self.nodes):
            outputs = {}
            for i, node in enumerate(parts_of(nodes)):
                z = mix("e", routes[depth - 1][i], below) if depth else x
                outputs[f"node {i}"] = call(node, z, named)
            below = stack(self._owner, f"the outputs of `stages[{depth}]`", outputs)
        per_task = {
            name: mix("e", self.head_choices[name](tau, warming)[0], below) for name in tasks
        }
        return Features(shared=(), per_task=per_task, aux={})


def _choices(choices: nn.ModuleList | nn.ModuleDict) -> Iterator[Choice]:
    return (choice for choice in parts_of(choices) if isinstance(choice, Choice))
