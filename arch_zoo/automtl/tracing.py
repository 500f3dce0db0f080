"""From a backbone to a graph of its operators."""

from collections.abc import Collection, Sequence
from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils import _pytree as pytree

from arch_zoo.automtl.guards import same_as_original, same_in_both_modes
from arch_zoo.automtl.normal_form import normalise
from arch_zoo.automtl.tracer import RecordingTracer, refusal
from arch_zoo.inputs import Inputs


def trace(
    backbone: nn.Module | Sequence[nn.Module],
    example: Inputs,
    leaves: Collection[type[nn.Module]] = (),
) -> fx.GraphModule:
    """Record a backbone as a graph in which nothing writes in place, and make sure that it is true.

    The graph follows ``train()`` and ``eval()`` and takes all sizes that the backbone takes.
    Layers of ``torch.nn``, their subclasses, and modules without submodules stay whole; functional
    dropout becomes a module. Backbone and random generators are left as they are.

    Args:
        backbone: Takes one tensor or one dict of tensors, which it reads by their names, with
            defaults for all else, and returns one tensor. A list of blocks is a chain whose blocks
            stay whole, whatever they do.
        example: A batch for it, shape ``[batch, ...]``, or a dict of such; one or two examples of
            it will do.
        leaves: Further classes of modules that stay whole.

    Returns:
        A copy with its own parameters; ``meta["tensor_meta"]`` of each node has its shape.

    Raises:
        TypeError: If an argument is no such thing.
        ValueError: If the backbone returns no tensor, or if a module cannot be traced, depends on
            the mode in a way that a graph cannot hold, or computes something else than its trace.

    Example:
        >>> block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        >>> [node.name for node in trace(block, torch.zeros(1, 3, 9, 9)).graph.nodes]
        ['x', '_0', '_1', 'output']
    """
    joined, whole = _joined(backbone)
    _check(example, leaves)
    root = deepcopy(joined)
    with torch.no_grad():
        output = root.eval()(example)  # sizes what is sized by the first input
    if not isinstance(output, Tensor):
        what = f"must return one tensor, got {type(output).__name__}"
        raise refusal("", type(root).__name__, what, "Wrap it in a module that returns one.")
    original = deepcopy(root)
    evaluate, train = RecordingTracer(leaves, whole), RecordingTracer(leaves, whole)
    evaluate.trace(deepcopy(root))
    graph = train.trace(root.train())
    same_in_both_modes(original, train.events, evaluate.events)
    traced = fx.GraphModule(root, graph, type(root).__name__)
    normalise(traced)
    same_as_original(original, traced, example, train.events)
    plain = fx.Graph()  # a graph that forgets the tracer, which loading a pickled one would call
    plain.output(plain.graph_copy(traced.graph, {}))
    result = fx.GraphModule(traced, plain, type(root).__name__)
    with torch.no_grad():
        ShapeProp(result.eval()).propagate(example)
    modes = {name: module.training for name, module in joined.named_modules()}
    for name, module in result.named_modules():
        module.training = modes.get(name, joined.training)
    return result


def _joined(backbone: nn.Module | Sequence[nn.Module]) -> tuple[nn.Module, bool]:
    """Return the backbone as one module, and whether its parts are blocks that stay whole."""
    if isinstance(backbone, nn.Module) and not isinstance(backbone, nn.ModuleList):
        return backbone, False
    if isinstance(backbone, Sequence | nn.ModuleList) and len(backbone):
        blocks = [*backbone]
        if all(isinstance(block, nn.Module) for block in blocks):
            return nn.Sequential(*blocks), True
    raise TypeError(
        "trace: `backbone` must be a module or a list of blocks, which are modules, got "
        f"{backbone!r}."
    )


def _check(example: Inputs, leaves: Collection[type[nn.Module]]) -> None:
    held = pytree.tree_leaves(example) if isinstance(example, Tensor | dict) else []
    if not held or not all(isinstance(x, Tensor) and x.ndim for x in held):
        raise TypeError(
            "trace: `example` must be a tensor whose first axis is the batch, or a dict of such, "
            f"got {type(example).__name__}."
        )
    for leaf in leaves:
        if not (isinstance(leaf, type) and issubclass(leaf, nn.Module)):
            raise TypeError(f"trace: `leaves` must be classes of modules, got {leaf!r}.")
