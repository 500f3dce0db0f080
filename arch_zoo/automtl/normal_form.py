"""The form of a graph in which nodes may be merged, copied and skipped: nothing writes in place."""

import torch
from torch import fx, nn
from torch.nn import functional

DROPOUTS: dict[object, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def normalise(traced: fx.GraphModule) -> None:
    """Replace what writes in place by what does not, and dropout functions by modules.

    A node that stays as it is although it writes, for want of a counterpart, shows in a run.

    Args:
        traced: Recorded in training mode; changed.
    """
    inplace = set()
    for name, module in traced.named_modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
            inplace.add(name)
    for node in traced.graph.nodes:
        if (node.op == "call_module" and node.target in inplace) or _take_out_of_place(node):
            # what reads the tensor from here on reads what was written into it
            node.all_input_nodes[0].replace_all_uses_with(node, delete_user_cb=node.__lt__)
        layer = DROPOUTS.get(node.target)
        if layer is not None and node.kwargs["training"]:
            _make_module(traced, node, layer)
    traced.recompile()


def _take_out_of_place(node: fx.Node) -> bool:
    """Let a function or method return a new tensor; return whether it wrote into its first one."""
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op == "call_method":
        name = str(node.target)
        if _says_inplace(name) and callable(getattr(torch.Tensor, name[:-1], None)):
            node.target = name[:-1]
            return True
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        for place in (functional, torch):
            if _says_inplace(name) and getattr(place, name, None) is node.target:
                node.target = getattr(place, name[:-1])
                return True
    return False


def _says_inplace(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _make_module(traced: fx.GraphModule, node: fx.Node, layer: type[nn.Module]) -> None:
    """Let a dropout function be a module, which follows the mode."""
    name = node.name
    while hasattr(traced, name):
        name += "_"
    traced.add_submodule(name, layer(node.kwargs["p"]))
    node.op, node.target, node.kwargs = "call_module", name, {}
