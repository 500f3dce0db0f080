"""Trees: networks whose tasks part ways one after the other."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from arch_zoo.encoders import parts_of
from arch_zoo.inputs import Inputs, call
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach


class Tree(MultiTaskModel):
    """A branching network: tasks share the stages on which their paths agree from the start.

    Args:
        stages: For each stage its nodes by number.
        heads: One module per task.
        paths: For each task the number of its node in each stage.

    Example:
        >>> stages = [{0: nn.Linear(4, 8)}, {0: nn.Linear(8, 8), 1: nn.Linear(8, 8)}]
        >>> heads = {"depth": nn.Linear(8, 1), "normal": nn.Linear(8, 3)}
        >>> tree = Tree(stages, heads, {"depth": (0, 0), "normal": (0, 1)})
        >>> [name for name, tasks in tree.parameter_task_sets().items() if len(tasks) > 1]
        ['nodes.0.0.weight', 'nodes.0.0.bias']
    """

    def __init__(
        self,
        stages: Sequence[Mapping[int, nn.Module]],
        heads: Heads,
        paths: Mapping[str, tuple[int, ...]],
    ) -> None:
        super().__init__(heads)
        self.path_of = dict(paths)
        self.nodes = nn.ModuleList(
            nn.ModuleDict({str(i): node for i, node in nodes.items()}) for nodes in stages
        )

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def receivers(self) -> Iterator[nn.Module]:
        for nodes in self.nodes:
            yield from parts_of(nodes)

    def reach(self) -> Reach:
        for name, path in self.path_of.items():
            for nodes, number in zip(self.nodes, path, strict=True):
                yield nodes.get_submodule(str(number)), (name,)

    def _encode(self, tasks: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        done: dict[tuple[int, ...], Any] = {(): x}
        for depth, nodes in enumerate(self.nodes):
            for name in tasks:
                path = self.path_of[name][: depth + 1]
                if path not in done:
                    node = nodes.get_submodule(str(path[-1]))
                    done[path] = call(node, done[path[:-1]], named)
        per_task = {name: done[self.path_of[name]] for name in tasks}
        return Features(shared=(), per_task=per_task, aux={})
