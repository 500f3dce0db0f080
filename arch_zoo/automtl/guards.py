"""Does a trace compute what the backbone computes, in each mode and at other sizes?"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from arch_zoo.automtl.normal_form import DROPOUTS
from arch_zoo.automtl.tracer import Event, Refusal, first_line, refusal
from arch_zoo.inputs import Inputs

SEEDS = range(3)  # of the passes in training mode; a branch drawn at random differs in some
MORE = 32  # positions by which the second size is larger; a multiple that most networks divide by
TOLERANCE = 1e-3  # relative to the largest entry: kernels may differ with the layout

# Modules at work, what happened, and what to compare of it.
Record: TypeAlias = list[tuple[str, str, Any]]


def same_in_both_modes(
    backbone: nn.Module, train: Sequence[Event], evaluate: Sequence[Event]
) -> None:
    """Refuse a backbone whose graph depends on the mode, but for functional dropout.

    Args:
        backbone: What was traced.
        train: What happened in training mode.
        evaluate: What happened in evaluation mode.

    Raises:
        Refusal: If the graphs differ; it names the module.
    """
    one, other = (
        [(event.within, event.what, _signature(event.nodes)) for event in events]
        for events in (train, evaluate)
    )
    path = first_difference(one, other, lambda value, value2: bool(value == value2))
    if path is not None:
        raise _refusal(backbone, path, "does something else in training than in evaluation mode")


def same_as_original(
    backbone: nn.Module, traced: fx.GraphModule, example: Inputs, events: Sequence[Event]
) -> None:
    """Compare trace and backbone at every module, in both modes and at several sizes.

    What the backbone itself refuses, such as another size, is not asked of the trace.

    Args:
        backbone: The original, which is only copied.
        traced: Its trace, which is only copied.
        example: A batch.
        events: What happened when it was traced.

    Raises:
        Refusal: If a module differs, or a node writes into a tensor that it reads.
    """
    for x, seeds in _inputs(example):
        # evaluation comes last, with the statistics that the passes in training mode left
        original, copy = deepcopy(backbone), deepcopy(traced)
        for training, seed in [*((True, seed) for seed in seeds), (False, 0)]:
            try:
                with _pass(original, x, training, seed):
                    wanted = _watched(original, events, x)
            except Exception:  # whatever users' code may raise; there is nothing to compare then
                continue
            with _pass(copy, x, training, seed):
                found = _interpreted(copy, events, x)
            path = first_difference(found, wanted, _close)
            if path is not None:
                shapes = [value.shape for value in pytree.tree_leaves(x)]
                size = " and ".join("x".join(str(n) for n in shape) for shape in shapes)
                mode = "training" if training else "evaluation"
                what = f"computes something else than its trace in {mode} mode, on {size} numbers"
                raise _refusal(backbone, path, what)


def first_difference(one: Record, other: Record, same: Callable[[Any, Any], bool]) -> str | None:
    """Return the module at work when two records part, or None if they do not.

    Args:
        one: What happened, in order.
        other: Likewise.
        same: Whether two values are.

    Example:
        >>> calls = [("", "enter block", 1), ("block", "enter block.conv", 1)]
        >>> first_difference(calls, [calls[0], ("block", "leave block", 1)], lambda a, b: a == b)
        'block'
    """
    # up to there both went the same way, so the same module is at work in both
    for (within, what, value), (_, what2, value2) in zip(one, other, strict=False):
        if what != what2 or not same(value, value2):
            return within
    return None


class _Interpreter(fx.Interpreter):
    """Run a graph, keep all values, and refuse nodes that write into what they read."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.extra_traceback = False  # it would stand in front of our sentence

    def run_node(self, n: fx.Node) -> Any:
        values = [self.env[source] for source in n.all_input_nodes]
        read = [(value, value._version) for value in values if isinstance(value, Tensor)]
        # the path of modules that called each other down to here, with their classes
        stack = n.meta.get("nn_module_stack") or {"": ("", type(self.module))}
        path, kind = [*stack.values()][-1]
        try:
            result = super().run_node(n)
        except Exception as error:
            what = f"runs where its trace fails: {first_line(error)}"
            raise refusal(path, kind.__name__, what) from error
        if any(value._version != version for value, version in read):
            cure = "Let it return a new tensor instead." if n.op == "call_module" else ""
            raise refusal(path, kind.__name__, "writes into a tensor that it reads", cure)
        return result


def _interpreted(traced: fx.GraphModule, events: Sequence[Event], x: Inputs) -> Record:
    """Run the trace and return what its modules took and returned."""
    interpreter = _Interpreter(traced)
    interpreter.run(x)
    values = {node.name: value for node, value in interpreter.env.items()}
    return [
        (event.within, event.what, None if event.node is None else values[event.node.name])
        for event in events
    ]


def _watched(original: nn.Module, events: Sequence[Event], x: Inputs) -> Record:
    """Run the original and return what its modules took and returned, but for those in a leaf."""
    nodes = events[-1].nodes
    leaves = tuple(f"{node.target}." for node in nodes if node.op == "call_module")
    record: Record = []
    stack = [""]

    def note(what: str, value: Any) -> None:
        # a copy, for others may write into it later
        record.append((stack[-1], what, value.clone() if isinstance(value, Tensor) else None))

    def watch(path: str, module: nn.Module) -> None:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            note(f"enter {path}", args[0] if args else None)
            stack.append(path)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            note(f"leave {path}", output)
            stack.pop()

        if path:
            hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave))

    hooks: list[RemovableHandle] = []
    try:
        for path, module in original.named_modules():
            if not path.startswith(leaves):
                watch(path, module)
        original(x)
    finally:
        for hook in hooks:
            hook.remove()
    return record


@contextmanager
def _pass(module: nn.Module, x: Inputs, training: bool, seed: int) -> Iterator[None]:
    """Set mode and seed; leave the generators as they were."""
    module.train(training)
    state = random.getstate()
    random.seed(seed)
    try:
        devices = {value.device for value in pytree.tree_leaves(x) if value.is_cuda}
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(state)


def _inputs(example: Inputs) -> Iterator[tuple[Inputs, range]]:
    """Yield the example, one more picture, and larger pictures, each with seeds to try."""
    yield example, SEEDS
    yield pytree.tree_map(lambda x: torch.cat([x, x[:1]]), example), SEEDS[:1]
    yield pytree.tree_map(_larger, example), SEEDS[:1]


def _larger(x: Tensor) -> Tensor:
    """Return a batch with more positions, which repeat the old ones."""
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        x = x.index_select(axis, torch.arange(n + MORE, device=x.device) % n)
    return x


def _close(one: Any, other: Any) -> bool:
    """Compare tensors up to rounding; what is no tensor is not compared."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    largest = float(other.abs().nan_to_num().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=TOLERANCE * largest, equal_nan=True)


def _signature(nodes: Sequence[fx.Node]) -> list[tuple[str, Any, str, str]]:
    """Return what was recorded, without the mode of dropouts, which become modules."""
    place = {node: f"%{i}" for i, node in enumerate(nodes)}

    def shown(arguments: Any) -> str:
        return str(map_arg(arguments, lambda node: place.get(node, "%")))

    signature = []
    for node in nodes:
        kwargs = {key: value for key, value in node.kwargs.items() if key != "training"}
        known = kwargs if node.target in DROPOUTS else node.kwargs
        signature.append((node.op, node.target, shown(node.args), shown(known)))
    return signature


def _refusal(backbone: nn.Module, path: str, what: str) -> Refusal:
    return refusal(path, type(backbone.get_submodule(path)).__name__, what)
