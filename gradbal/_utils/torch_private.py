"""Every private name of torch that this package reads, in one place.

Nothing here is promised by torch. :func:`missing` names what a release has renamed or removed, so
that the caller can say in the log what is not available and what is used instead.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.parallel.distributed import _DDPSink
from torch.optim import optimizer as _optimizer

LEAF = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)  # AccumulateGrad
DDP_SINK = getattr(_DDPSink, "_backward_cls", None)  # the identity through which DDP's outputs pass

OPTIMIZER_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
GLOBAL_OPTIMIZER_HOOKS = (
    _optimizer._global_optimizer_pre_hooks,
    _optimizer._global_optimizer_post_hooks,
)


def profiler_enabled() -> bool:
    """Say whether a profiler of torch is running; torch.compile can trace this one."""
    return bool(profiler._is_profiler_enabled)


def post_accumulate_hooks(params: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
    """Return the user's hooks that torch calls after it has added to ``.grad``, and for what.

    Those of ``torch.distributed`` belong to passes of its own.
    """
    found = []
    for param in params:
        for hook in (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values():
            if not str(getattr(hook, "__module__", "")).startswith("torch.distributed"):
                found.append((hook, param))
    return found


def reduces_float32(device: torch.device) -> bool:
    """Say whether torch may compute products of float32 matrices in a lower precision.

    Newer releases have a switch for each backend and raise where the older one is read after it.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    switch = getattr(getattr(backend, "matmul", None), "fp32_precision", None)
    if switch is None:
        return torch.get_float32_matmul_precision() != "highest"
    return switch not in ("ieee", "none")


# ---------------------------------------------------------------------- tensors saved by a node


@cache
def missing() -> str | None:
    """Say which name is missing that tells whether a saved tensor went through hooks.

    Without it a checkpointed or offloaded tensor looks like any other, and to read it could cost a
    forward pass.

    Returns:
        A clause for a log line, or None if all names are there.
    """
    with torch.inference_mode(False), torch.enable_grad():  # it may be asked in the midst of a step
        one = torch.ones((1, 1), requires_grad=True)
        raw = getattr((one @ one.detach()).grad_fn, "_raw_saved_mat2", None)
    if raw is None:
        return f"torch {torch.__version__} does not show which tensors a node has saved"
    if not hasattr(raw, "unpack_hook"):
        return f"torch {torch.__version__} does not show whether a saved tensor has hooks"
    return None


def saved_tensor(node: Node, name: str) -> Tensor | None:
    """Return a tensor that a node has saved for its backward formula.

    Args:
        node: A node of the graph.
        name: Name of the attribute, such as ``"self"``.

    Returns:
        None if the node has saved no such tensor, or has saved it through hooks (checkpoints,
        offloading): to unpack it may cost a forward pass.
    """
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", raw) is not None:
        return None
    saved: Tensor = getattr(node, f"_saved_{name}")
    return saved


def saved(node: Node, name: str, default: Any = None) -> Any:  # numbers, tuples, sizes: as saved
    """Return a plain value that a node has saved, such as a number or a size."""
    return getattr(node, f"_saved_{name}", default)


@cache
def saves(kind: type[Node], name: str) -> bool:
    """Say whether nodes of a type have saved a value under this name."""
    return hasattr(kind, f"_saved_{name}")


def signed(number: int) -> int:
    """Return a saved integer with its sign: torch shows negative ones as unsigned."""
    return number - 2**64 if number >= 2**63 else number


# ---------------------------------------------------------------------- nodes of the graph


def output_metadata(node: Node) -> Sequence[Any]:
    """Return shape, dtype and device of what arrives at each output of a node in the backward."""
    found: Sequence[Any] = node._input_metadata
    return found


def ones_at(edge: GradientEdge) -> Tensor:
    """Return the initial gradient of a loss that stands at an edge: ones of its shape and dtype."""
    like = output_metadata(edge.node)[edge.output_nr]
    return torch.ones(like.shape, dtype=like.dtype, device=like.device)


def order_of_creation(node: Node) -> int:
    """Return a number that grows with each node that the forward pass records."""
    return node._sequence_nr()


def has_tensor_hooks(tensor: Tensor) -> bool:
    """Say whether hooks were registered on a leaf."""
    return bool(tensor._backward_hooks)
