"""A tracer of `torch.fx` that knows what to leave whole, and that says which module failed."""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

# Modules of `torch.nn` that only hold others: what inherits from them is no layer.
CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Refusal(ValueError):
    """A backbone, or a module of it, cannot be traced."""


def refusal(path: str, kind: str, reason: str, cure: str = "") -> Refusal:
    """Return an error that names a module, says why it is refused, and what to do.

    Args:
        path: The module within the backbone; empty for the backbone itself.
        kind: Name of its class.
        reason: What it does, as the rest of a sentence.
        cure: What to do about it; by default to take the module, or blocks, as one piece.
    """
    place = f"`{path}` ({kind})" if path else f"the backbone ({kind})"
    leaf = f"Pass `leaves=[{kind}]` to take it as one piece, or the" if path else "Pass the"
    cure = cure or f"{leaf} backbone as a list of blocks, which are searched as wholes."
    return Refusal(f"trace: {place} {reason}. {cure}")


class Event(NamedTuple):
    """A module was entered or left in a trace.

    Args:
        within: Path of the module that was at work until then.
        what: Which of the two, and path of the module.
        node: What was handed over, or None if that was no single value of the graph.
        nodes: When it is left: what was recorded since it was entered.
    """

    within: str
    what: str
    node: fx.Node | None
    nodes: tuple[fx.Node, ...] = ()


class RecordingTracer(fx.Tracer):
    """Trace through containers of layers and take layers as they are.

    A layer is a module of ``torch.nn``, a subclass of one, or a module without submodules: it may
    pad by the size of its input, standardise its weight or read its mode, all as it likes.

    Args:
        leaves: Further classes to take as they are.
        whole: Take every submodule as it is.
    """

    def __init__(self, leaves: Collection[type[nn.Module]], whole: bool) -> None:
        super().__init__()
        self.leaves = tuple(leaves)
        self.whole = whole
        self.events: list[Event] = []

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with self._guarded(root, ""):
            graph = super().trace(root, concrete_args)
        output = graph.output_node().args[0]
        self.events.append(Event("", "leave ", _node_of(output), tuple(graph.nodes)))
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Give the backbone its one input; further arguments keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        bases = (base for base in type(m).__mro__ if base.__module__.startswith("torch.nn"))
        layer = next(bases) not in CONTAINERS
        return self.whole or isinstance(m, self.leaves) or layer or next(m.children(), None) is None

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path, start = self.path_of_module(m), len(self.graph.nodes)
        within = [*self.module_stack.values()][-1][0] if self.module_stack else ""
        self.events.append(Event(within, f"enter {path}", _node_of(*args[:1])))
        with self._guarded(m, path):
            result = super().call_module(m, forward, args, kwargs)
        nodes = tuple(self.graph.nodes)[start:]
        self.events.append(Event(path, f"leave {path}", _node_of(result), nodes))
        return result

    @contextmanager
    def _guarded(self, module: nn.Module, path: str) -> Iterator[None]:
        """Refuse what raises, and what draws random numbers that a trace would freeze."""
        kind, generator, state = type(module).__name__, torch.get_rng_state(), random.getstate()
        try:
            yield
        except Refusal:
            raise
        except Exception as error:
            raise refusal(path, kind, f"cannot be traced: {first_line(error)}") from error
        if not torch.equal(generator, torch.get_rng_state()) or state != random.getstate():
            raise refusal(path, kind, "draws random numbers, which a trace would freeze")


def _node_of(value: Any = None) -> fx.Node | None:
    found = value.node if isinstance(value, fx.Proxy) else value
    return found if isinstance(found, fx.Node) else None


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, without its full stop."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
