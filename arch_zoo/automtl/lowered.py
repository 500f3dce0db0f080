"""The network that choices make."""

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from arch_zoo.automtl.operators import Taking
from arch_zoo.inputs import Inputs
from arch_zoo.model import Features, Heads, MultiTaskModel, Reach


class Segment(NamedTuple):
    """The part of a network that the same tasks read.

    Args:
        tasks: Those that read it.
        inputs: Names of the values that it takes.
        run: From the network and these values to new ones, by name.
    """

    tasks: frozenset[str]
    inputs: tuple[str, ...]
    run: Callable[..., dict[str, Tensor]]


class Lowered(MultiTaskModel):
    """A plain network that computes each value once for all tasks that read it.

    Args:
        network: A function of the input to the features of each task, by task; ``network.code``
            is what it does.
        heads: One module per task, which reads its features.
    """

    def __init__(self, network: fx.GraphModule, heads: Heads) -> None:
        super().__init__(heads)
        self.network = network
        self._cut()

    def encode(
        self, x: Inputs = None, tasks: Sequence[str] | None = None, **named: Inputs
    ) -> Features:
        return self.by_batch(self._encode, tasks, x, named)

    def receivers(self) -> Iterator[nn.Module]:
        yield from (m.module for m in self.network.modules() if isinstance(m, Taking))

    def reach(self) -> Reach:
        for node, tasks in _readers(self.network.graph).items():
            if node.op in ("call_module", "get_attr"):
                yield attrgetter(str(node.target))(self.network), tasks

    def _encode(self, tasks: tuple[str, ...], x: Inputs, **named: Inputs) -> Features:
        if len(tasks) == len(self.streams):
            given = (x, named) if self.takes_named else (x,)
            return Features(shared=(), per_task=self.network(*given), aux={})
        values = {"x": x, "named": named}
        for segment in self.segments:
            if not segment.tasks.isdisjoint(tasks):
                values |= segment.run(self.network, *(values[name] for name in segment.inputs))
        per_task = {task: values[name] for task, name in self.results.items() if task in tasks}
        return Features(shared=(), per_task=per_task, aux={})

    def _cut(self) -> None:
        """Cut the network by the tasks that read its values, those of most tasks first."""
        groups: dict[frozenset[str], list[fx.Node]] = {}
        for node, tasks in _readers(self.network.graph).items():
            if node.op != "placeholder":
                groups.setdefault(tasks, []).append(node)
        self.segments = [
            _segment(self.network, tasks, groups[tasks])
            for tasks in sorted(groups, key=len, reverse=True)
        ]
        self.takes_named = any(node.target == "named" for node in self.network.graph.nodes)
        self.results = {task: node.name for task, node in _results(self.network.graph).items()}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "segments"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch
        self._cut()  # functions of torch.fx do not travel


def _results(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the node of each task's features."""
    results: dict[str, fx.Node] = next(iter(reversed(graph.nodes))).args[0]
    return results


def _readers(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """Return for each node the tasks whose features depend on it."""
    *nodes, _ = graph.nodes
    found: dict[fx.Node, frozenset[str]] = dict.fromkeys(nodes, frozenset())
    for task, node in _results(graph).items():
        found[node] |= {task}
    for node in reversed(nodes):
        for below in node.all_input_nodes:
            found[below] |= found[node]
    return found


def _segment(network: fx.GraphModule, tasks: frozenset[str], nodes: list[fx.Node]) -> Segment:
    """Return some nodes as a segment, whose values are all that others read."""
    graph = fx.Graph()
    inside = set(nodes)
    inputs = dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside)
    values = {node: graph.placeholder(node.name) for node in inputs}
    for node in nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    outputs = [node for node in nodes if not inside.issuperset(node.users)]
    graph.output({node.name: values[node] for node in outputs})
    run = type(fx.GraphModule(network, graph)).forward
    return Segment(tasks, tuple(node.name for node in inputs), run)
