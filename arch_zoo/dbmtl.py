"""DBMTL: tasks whose features depend on those of their parents, in a graph without circles."""

from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.decoders import Decoded, Decoder
from arch_zoo.encoders import Encoder
from arch_zoo.hps import HPS


class DBMTLDecoder(Decoder):
    r"""Towers, and relations that read the features of parents.

    .. math:: a_t = f_t(x), \quad b_t = g_t([a_t; b_s \text{ for parents } s]), \quad y_t = h_t(b_t)

    where :math:`b_t = a_t` without a relation `g`.

    Args:
        towers: By task, from the task's stream to features.
        heads: By task, from features to the output.
        parents: By task, the tasks whose features it reads, in this order.
        relations: For each task with parents, from the features of all joined to those of one.

    Raises:
        ValueError: If names do not fit, or the graph has a circle.
    """

    def __init__(
        self,
        towers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        parents: Mapping[str, Sequence[str]],
        relations: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(tuple(towers))
        known = set(self.tasks)
        named = {*heads, *parents, *relations, *(p for ps in parents.values() for p in ps)}
        if named - known or set(heads) != known:
            raise ValueError(
                f"DBMTL: `heads`, `parents` and `relations` must be of the tasks of `towers`, "
                f"{sorted(known)}, got {sorted(named)}."
            )
        with_parents = {name for name, found in parents.items() if found}
        if with_parents != set(relations):
            raise ValueError(
                "DBMTL: `relations` must be those of the tasks with parents, "
                f"{sorted(with_parents)}, got {sorted(relations)}."
            )
        self.parents = {name: tuple(parents.get(name, ())) for name in self.tasks}
        try:
            self.order = tuple(TopologicalSorter(self.parents).static_order())
        except CycleError as error:
            circle = " -> ".join(map(repr, error.args[1]))
            raise ValueError(f"DBMTL: `parents` must have no circle, got {circle}.") from None
        self.towers = nn.ModuleDict(towers)
        self.relations = nn.ModuleDict(relations)
        self.heads = nn.ModuleDict({name: heads[name] for name in self.tasks})

    def sources(self, task: str) -> tuple[str, ...]:
        found = {task}
        for name in reversed(self.order):
            if name in found:
                found.update(self.parents[name])
        return tuple(name for name in self.tasks if name in found)

    def reach(self) -> Iterator[tuple[nn.Module, Sequence[str]]]:
        for name in self.tasks:
            below = [task for task in self.tasks if name in self.sources(task)]
            yield self.towers[name], below
            yield self.heads[name], (name,)
            if name in self.relations:
                yield self.relations[name], below

    def forward(self, streams: Mapping[str, Any], tasks: Sequence[str], **named: Any) -> Decoded:
        needed = {name for task in tasks for name in self.sources(task)}
        features: dict[str, Tensor] = {}
        for name in self.order:
            if name in needed:
                z = self.towers[name](streams[name])
                if name in self.relations:
                    joined = [z, *(features[parent] for parent in self.parents[name])]
                    z = self.relations[name](torch.cat(joined, dim=-1))
                features[name] = z
        return Decoded({name: self.heads[name](features[name]) for name in tasks})


class DBMTL(HPS):
    """Deep Bayesian multi-target learning: the features of a task depend on those of its parents.

    Args:
        encoder: The shared embedding, which reads the batch.
        towers: By task, from the embedding to features.
        heads: By task, from features to the output.
        parents: By task, the tasks whose features it reads.
        relations: For each task with parents, from all these features joined to those of one.

    Raises:
        TypeError: If the encoder is none.
        ValueError: If names do not fit, or the graph has a circle.

    Source:
        Wang et al., Deep Bayesian Multi-Target Learning for Recommender Systems, 2019.

    Example:
        >>> towers = {"buy": nn.Linear(8, 4), "click": nn.Linear(8, 4)}
        >>> heads = {"buy": nn.Linear(4, 1), "click": nn.Linear(4, 1)}
        >>> relations = {"buy": nn.Linear(8, 4)}
        >>> model = DBMTL(nn.Linear(6, 8), towers, heads, {"buy": ["click"]}, relations)
        >>> sorted(model.parameter_task_sets()["heads.towers.click.weight"])
        ['buy', 'click']
    """

    def __init__(
        self,
        encoder: Encoder,
        towers: Mapping[str, nn.Module],
        heads: Mapping[str, nn.Module],
        parents: Mapping[str, Sequence[str]],
        relations: Mapping[str, nn.Module],
    ) -> None:
        super().__init__(encoder, DBMTLDecoder(towers, heads, parents, relations))
