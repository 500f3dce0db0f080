"""From a traced network to one with branches, and what is known of these."""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils import _pytree as pytree

from arch_zoo.automtl.costs import Cost, model_cost
from arch_zoo.automtl.operators import Operator, PerTask, is_norm
from arch_zoo.automtl.policy import Policy
from arch_zoo.automtl.skips import skip_of

Searchable: TypeAlias = Callable[[fx.Node, nn.Module], bool]
Operators: TypeAlias = Mapping[str, fx.Node]  # the first calls of searchable modules, by path


LEAST = 0.5  # of the parameters of a network that its operators hold, unless the user chose them


def find_operators(
    traced: fx.GraphModule,
    searchable: Searchable | None,
    blocks: bool,
    leaves: Collection[type[nn.Module]] = (),
) -> Operators:
    """Return the first calls of the modules to search, by path.

    Args:
        traced: A network with shapes on its nodes.
        searchable: Decides about calls with one input; by default all modules of a chain of
            blocks, and else convolutions with more than one position. Where these hold less than
            half of the parameters, linear layers and leaves come along.
        blocks: Whether it is a chain of blocks.
        leaves: Classes of modules that the user left whole.

    Raises:
        ValueError: If there are none, or if those found by default hold less than half of the
            parameters.
    """
    if searchable is not None or blocks:
        return _matching(traced, searchable or _is_any)
    found = _matching(traced, _is_map, required=False)
    if _share(traced, found) < LEAST:

        def is_layer(node: fx.Node, module: nn.Module) -> bool:
            return _is_map(node, module) or isinstance(module, (nn.Linear, *leaves))

        found = _matching(traced, is_layer)
    if (share := _share(traced, found)) < LEAST:
        few = ", ".join(repr(path) for path in list(found)[:3])
        raise ValueError(
            f"AutoMTL: the operators to search must hold at least {LEAST:.0%} of the parameters of "
            f"`backbone`, got {share:.0%} in {few}. Pass the backbone as a list of blocks, the "
            "classes of its blocks as `leaves`, or `searchable` to choose on purpose."
        )
    return found


def _matching(
    traced: fx.GraphModule, decide: Searchable, required: bool = True
) -> dict[str, fx.Node]:
    """Return the first calls of the modules that a predicate holds for, by path."""
    found: dict[str, fx.Node] = {}
    for node in traced.graph.nodes:
        single = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if single and decide(node, traced.get_submodule(node.target)):
            found.setdefault(node.target, node)
    if required and not found:
        raise ValueError(
            "AutoMTL: `searchable` must hold for at least one module of `backbone` that is called "
            "with one input, got none."
        )
    return found


def _share(traced: fx.GraphModule, operators: Operators) -> float:
    """Return the share of a network's parameters that are in its operators."""
    modules = [traced.get_submodule(path) for path in operators]
    held = {id(p): p.numel() for module in modules for p in module.parameters()}
    total = sum(parameter.numel() for parameter in traced.parameters())
    return sum(held.values()) / total if total else 1.0


def add_branches(
    traced: fx.GraphModule,
    tasks: Sequence[str],
    operators: Operators,
    task_norms: bool,
    skip: str,
    copied: bool = True,
) -> fx.GraphModule:
    """Return a network of input, choices of a task, and the pass.

    Modules are named as the calls in the code. Copies are made all at once for each task, so that
    what is tied stays tied; without ``copied`` operators have none.
    """
    calls = [node for node in traced.graph.nodes if node.op in ("call_module", "get_attr")]
    parts = {node.target: attrgetter(node.target)(traced) for node in calls}
    own = {p: m for p, m in parts.items() if p in operators or (task_norms and is_norm(m))}
    copies = {task: deepcopy(own) for task in tasks}
    index = {path: number for number, path in enumerate(operators)}
    for path, module in own.items():
        specific = {task: copies[task][path] for task in tasks}
        if path in operators:
            skips = _skips(module, operators[path], tasks, skip)
            parts[path] = Operator(index[path], module, specific if copied else {}, skips, tasks)
        else:
            parts[path] = PerTask(specific)
    return _emit(traced.graph, parts)


def _skips(
    module: nn.Module, call: fx.Node, tasks: Sequence[str], skip: str
) -> dict[str, nn.Module]:
    before, after = call.all_input_nodes[0].meta["tensor_meta"], _example(call)
    if not isinstance(before, TensorMetadata):  # a dict, for which no average can stand
        return {}
    made = {task: skip_of(module, before.shape, after.shape, skip) for task in tasks}
    return {task: found for task, found in made.items() if found is not None}


def _emit(traced: fx.Graph, parts: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Return the graph with these parts, which are told choices and task where they ask."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced, {}))
    first = next(iter(graph.nodes)).next
    with graph.inserting_before(first):
        given = graph.placeholder("choices"), graph.placeholder("given")
    names: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            if isinstance(parts[node.target], PerTask):
                node.args += given
            node.target = names.setdefault(node.target, node.name)
    return fx.GraphModule({names[path]: part for path, part in parts.items()}, graph)


def make_policy(
    traced: fx.GraphModule,
    tasks: Sequence[str],
    operators: Operators,
    network: fx.GraphModule,
    tau: nn.Module | None,
) -> Policy:
    """Return the policy of a network with branches."""
    depth: dict[fx.Node, int] = {}
    for node in traced.graph.nodes:
        longest = max((depth[below] for below in node.all_input_nodes), default=0)
        depth[node] = longest + (node.target in operators)
    parts = {part.index: part for part in network.children() if isinstance(part, Operator)}
    legal, costs = [], []
    for index, node in enumerate(operators.values()):
        branches = parts[index].branches(tasks[0])
        before = node.all_input_nodes[0].meta["tensor_meta"]
        legal.append([branch is not None for branch in branches])
        costs.append([_cost(branch, before) for branch in branches])
    sizes, operations = torch.tensor(costs).unbind(dim=-1)
    found = torch.tensor([depth[node] for node in operators.values()])
    return Policy(tasks, torch.tensor(legal), found, sizes, operations, tau)


def _example(node: fx.Node) -> TensorMetadata:
    """Return shape and type of a value in the example."""
    found: TensorMetadata = node.meta["tensor_meta"]
    return found


def _is_map(node: fx.Node, module: nn.Module) -> bool:
    """Return whether it is a convolution whose output has more than one position."""
    return isinstance(module, nn.Conv2d) and _example(node).shape[-2:] != (1, 1)


def _is_any(node: fx.Node, module: nn.Module) -> bool:
    return True


def _cost(branch: nn.Module | None, before: Any) -> Cost:
    """Return what a branch costs on one such example, nothing if there is no branch.

    Args:
        branch: Is called.
        before: Shape and type of the tensor that it takes, or a dict of these.
    """
    if branch is None:
        return Cost(0, 0)
    device = next(branch.parameters(), torch.zeros(())).device

    def zeros(known: TensorMetadata) -> Tensor:
        return torch.zeros(1, *known.shape[1:], dtype=known.dtype, device=device)

    def is_leaf(known: object) -> bool:
        return isinstance(known, TensorMetadata)

    return model_cost(branch, pytree.tree_map(zeros, before, is_leaf=is_leaf))
