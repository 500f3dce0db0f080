"""From choices to a plain network, in which tasks go together as long as they compute the same."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from operator import attrgetter
from typing import Any

from torch import fx, nn

from arch_zoo.automtl.operators import PerTask, Taking, is_norm
from arch_zoo.inputs import takes


def lower(network: fx.GraphModule, choices: Mapping[str, Sequence[int]]) -> fx.GraphModule:
    """Return the network that some choices make, a function of the input to outputs by task.

    Where a module takes named inputs, all of these are its second argument.

    Its modules are those of the network, but for norms of tasks that have parted: these are copies,
    so that no running statistics mix different values.

    Args:
        network: One with branches.
        choices: The branch of each operator, by task.
    """
    return _Lowering(network, choices).run()


class _Lowering:
    """Value numbering: what calls the same on the same inputs is one node."""

    def __init__(self, network: fx.GraphModule, choices: Mapping[str, Sequence[int]]) -> None:
        self.network = network
        self.choices = choices
        self.graph = fx.Graph()
        self.parts: dict[str, Any] = {}
        self.values: dict[str, dict[fx.Node, fx.Node]] = {task: {} for task in choices}
        self.numbers: dict[tuple[Any, ...], fx.Node] = {}
        self.norms: dict[tuple[str, str], str] = {}  # where each task finds each norm

    def run(self) -> fx.GraphModule:
        x, _, _, *nodes, output = self.network.graph.nodes
        given = self.graph.placeholder("x")
        self.named = self.graph.placeholder("named")
        for known in self.values.values():
            known[x] = given
        for node in nodes:
            for task, known in self.values.items():
                known[node] = self.value(node, task)
        result = output.all_input_nodes[0]
        self.graph.output({task: known[result] for task, known in self.values.items()})
        if not self.named.users:
            self.graph.erase_node(self.named)
        self.graph.lint()
        return fx.GraphModule(self.parts, self.graph)

    def value(self, node: fx.Node, task: str) -> fx.Node:
        """Return the node that computes for a task what a node of the network does."""
        known = self.values[task]
        target, args, name = node.target, node.args, None
        if node.op in ("call_module", "get_attr"):
            target = str(target)
            part = attrgetter(target)(self.network)
            if isinstance(part, PerTask):
                target, args = f"{target}.{part.taken(self.choices[task], task)}", args[:1]
                part = self.network.get_submodule(target)
                names = takes(part, first=False)
                if names is None or names:
                    part = self.parts.get(target) or Taking(part)
            elif is_norm(part):
                target = self.norms.setdefault((target, task), f"{target}.{self.who(node, task)}")
                part = self.parts.get(target) or deepcopy(part)
            if type(part) is nn.Identity:
                return known[node.all_input_nodes[0]]
            self.parts[target] = part
        if target == node.target and self.who(node, task) != "shared":
            name = f"{node.name}_{task}"
        number = (node, target, *(known[i] for i in node.all_input_nodes if i in known))
        if number not in self.numbers:
            given = fx.map_arg((args, node.kwargs), known.__getitem__)
            if isinstance(self.parts.get(str(target)), Taking):
                given = ((*given[0], self.named), given[1])
            self.numbers[number] = self.graph.create_node(node.op, target, *given, name)
        return self.numbers[number]

    def who(self, node: fx.Node, task: str) -> str:
        """Return a name for the tasks for which a node has the same inputs as for this one."""
        inputs = {t: [v.get(i) for i in node.all_input_nodes] for t, v in self.values.items()}
        group = [other for other in inputs if inputs[other] == inputs[task]]
        return "shared" if len(group) == len(inputs) else f"specific.{group[0]}"
