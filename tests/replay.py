"""Steps that are captured once and replayed: in a CUDA graph, or recorded on the CPU."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gradbal import MTLOptimizer


class Recording(TorchDispatchMode):
    """Record every operation with the tensors that it reads and writes, and run them again there.

    As in a CUDA graph no Python runs again: a tensor that was rebound keeps its old value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, *map(_without_graph, (args, kwargs or {}, found))))
        return found

    def replay(self) -> None:
        """Run the operations again on the same storages."""
        for function, args, kwargs, found in self.calls:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(tree_leaves(found), again, strict=True):
                if isinstance(old, Tensor) and old.numel() and not _same_storage(old, new):
                    old.copy_(new)


def _without_graph(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def capture(optimizer: MTLOptimizer, step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step, without taking it, and return what replays it."""
    for param in optimizer.base.param_groups[0]["params"]:
        param.grad = None
    if torch.cuda.is_available():
        graph = torch.cuda.CUDAGraph()
        if optimizer.core.generator.device.type == "cuda":
            graph.register_generator_state(optimizer.core.generator)
        with torch.cuda.graph(graph):
            step()
        return graph.replay
    core = optimizer.core
    kept = [t for group in optimizer.base.param_groups for t in group["params"]]
    kept += [t for state in optimizer.base.state.values() for t in state.values()]
    kept += [holder[path[-1]] for path, holder in core._slots()]
    kept = [tensor for tensor in kept if isinstance(tensor, Tensor)]
    before, drawn = [t.detach().clone() for t in kept], core.generator.get_state()
    with Recording() as recording:
        step()
    with torch.no_grad():  # a capture executes nothing
        torch._foreach_copy_([t.detach() for t in kept], before)
    core.generator.set_state(drawn)
    return torch.no_grad()(recording.replay)
