"""Which tasks should share: affinities from gradients, groups, and a network of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from arch_zoo.encoders import Encoder, copies_of
from arch_zoo.model import Heads
from arch_zoo.tree import Tree


class TaskAffinity:
    r"""How much a step on one task lowers the loss of another, averaged over steps.

    To first order, :math:`Z_{i \to j} = \eta \langle g_i, g_j \rangle / \ell_j` for gradients `g`
    of the shared parameters, losses and learning rate: all of it is known when a rule on gradients
    takes its step, ``affinity.update(mtl_opt.last.grams["model"], mtl_opt.last.losses, lr)``.

    Args:
        tasks: Names in the order of the rows.

    Source:
        Fifty et al., Efficiently Identifying Task Groupings for Multi-Task Learning, NeurIPS 2021,
        equation 1, to first order; :func:`lookahead_affinity` takes the step.

    Example:
        >>> affinity = TaskAffinity(["depth", "normal"])
        >>> affinity.update(torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.tensor([1.0, 2.0]), 0.1)
        >>> affinity.matrix  # row: whose step, column: whose loss
        tensor([[0.1000, 0.0250],
                [0.0500, 0.0500]])
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.total = torch.zeros(len(self.tasks), len(self.tasks))
        self.steps = 0

    def update(self, gram: Tensor, losses: Tensor, lr: float) -> None:
        """Count a step.

        Args:
            gram: Inner products of the task gradients, ``[tasks, tasks]``.
            losses: Positive, ``[tasks]``.
            lr: Learning rate of the step.

        Raises:
            ValueError: If a loss is not positive, whose relative change has no meaning.
        """
        if not bool((losses > 0).all()):
            raise ValueError(f"TaskAffinity: `losses` must be > 0, got {losses.tolist()}.")
        self.total = self.total + (lr * gram.detach() / losses.detach()).to(self.total)
        self.steps += 1

    @property
    def matrix(self) -> Tensor:
        """The mean, ``[tasks, tasks]``: row `i`, column `j` is the gain of `j` by a step on `i`."""
        return self.total / max(1, self.steps)


def lookahead_affinity(
    losses: Callable[[], Mapping[str, Tensor]], parameters: Iterable[nn.Parameter], lr: float
) -> Tensor:
    r"""Return the affinities of one batch by a step on each task, shape ``[tasks, tasks]``.

    .. math:: Z_{i \to j} = 1 - \ell_j(\theta - \eta g_i) / \ell_j(\theta)

    Args:
        losses: Computes the losses by task on one batch, the same at each call; norms with running
            statistics should be in evaluation mode.
        parameters: The shared ones, which are restored.
        lr: Length of the step.

    Raises:
        ValueError: If a loss is not positive.
    """
    shared = list(parameters)
    found = losses()
    values = torch.stack([loss.detach() for loss in found.values()])
    if not bool((values > 0).all()):
        raise ValueError(f"lookahead_affinity: `losses` must be > 0, got {values.tolist()}.")
    gradients = [
        torch.autograd.grad(loss, shared, retain_graph=True, materialize_grads=True)
        for loss in found.values()
    ]
    start = [parameter.detach().clone() for parameter in shared]
    rows = []
    with torch.no_grad():
        try:
            for gradient in gradients:
                for parameter, before, slope in zip(shared, start, gradient, strict=True):
                    parameter.copy_(before - lr * slope)
                after = torch.stack(list(losses().values()))
                rows.append(1 - after / values)
        finally:
            for parameter, before in zip(shared, start, strict=True):
                parameter.copy_(before)
    return torch.stack(rows)


def group_tasks(affinity: Tensor, tasks: Sequence[str], budget: int) -> list[tuple[str, ...]]:
    """Return at most so many groups in which tasks help each other most.

    A task in a group scores the mean affinity from the others of it, a task alone zero; each task
    counts in its best group, and groups may overlap. All choices are tried, so keep to about eight
    tasks.

    Args:
        affinity: ``[tasks, tasks]``; row `i`, column `j` is the gain of `j` by a step on `i`.
        tasks: Their names.
        budget: Largest number of groups; at least one.

    Returns:
        Groups that together hold all tasks, each group one that is the best of some task.

    Raises:
        ValueError: If the shape or the budget does not fit.

    Source:
        Fifty et al., NeurIPS 2021, the selection of groups; a task alone is possible here.

    Example:
        >>> pairs = torch.tensor([[0.0, 1, -1, -1], [1, 0, -1, -1], [-1, -1, 0, 1], [-1, -1, 1, 0]])
        >>> group_tasks(pairs, ["a", "b", "c", "d"], budget=2)
        [('a', 'b'), ('c', 'd')]
    """
    n = len(tasks)
    if tuple(affinity.shape) != (n, n) or budget < 1:
        raise ValueError(
            f"group_tasks: `affinity` must have shape [{n}, {n}] and `budget` be >= 1, got "
            f"{list(affinity.shape)} and {budget}."
        )
    gains = affinity.tolist()
    scores: dict[frozenset[int], dict[int, float]] = {}
    for size in range(1, n + 1):
        for members in combinations(range(n), size):
            scores[frozenset(members)] = {
                t: sum(gains[s][t] for s in members if s != t) / max(1, size - 1) for t in members
            }
    best: tuple[float, list[frozenset[int]]] = (-float("inf"), [])
    for number in range(1, min(budget, n) + 1):
        for groups in combinations(scores, number):
            if len(frozenset().union(*groups)) < n:
                continue
            total = sum(max(scores[g][t] for g in groups if t in g) for t in range(n))
            if total > best[0] + 1e-12:
                best = (total, list(groups))
    used = {
        max((g for g in best[1] if t in g), key=lambda g, t=t: scores[g][t])  # type: ignore[misc]
        for t in range(n)
    }
    ordered = sorted(used, key=sorted)
    return [tuple(tasks[t] for t in sorted(group)) for group in ordered]


def grouped(
    stages: Encoder, heads: Heads, groups: Sequence[Sequence[str]], *, split_at: int = 0
) -> Tree:
    """Return a network whose tasks share the first stages, and the others within their group.

    Args:
        stages: A factory of all stages, called once per group, or stages to copy.
        heads: One module per task.
        groups: Tasks by group; each task goes with the first group that holds it.
        split_at: Number of stages that all tasks share; 0 gives one network per group.

    Raises:
        ValueError: If a task is in no group, or there are too few stages.

    Example:
        >>> heads = {"a": nn.Linear(8, 1), "b": nn.Linear(8, 1), "c": nn.Linear(8, 1)}
        >>> net = [nn.Linear(4, 8), nn.Linear(8, 8)]
        >>> model = grouped(net, heads, [("a", "b"), ("c",)], split_at=1)
        >>> sorted(model.parameter_task_sets()["nodes.1.0.weight"])
        ['a', 'b']
    """
    copies = copies_of("grouped", "stages", stages, len(groups))
    depth = len(copies[0])
    if not 0 <= split_at <= depth:
        raise ValueError(
            f"grouped: `split_at` must be between 0 and {depth} stages, got {split_at}."
        )
    names = list(heads.streams if not isinstance(heads, Mapping) else heads)
    place = {}
    for name in names:
        found = [number for number, group in enumerate(groups) if name in group]
        if not found:
            raise ValueError(f"grouped: `groups` must hold every task, got none with {name!r}.")
        place[name] = found[0]
    used = sorted(set(place.values()))
    nodes: list[dict[int, nn.Module]] = [{0: copies[used[0]][d]} for d in range(split_at)]
    nodes += [{number: copies[number][d] for number in used} for d in range(split_at, depth)]
    rest = depth - split_at
    paths = {name: (0,) * split_at + (number,) * rest for name, number in place.items()}
    return Tree(nodes, heads, paths)
