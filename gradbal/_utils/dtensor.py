"""Parameters that are spread over processes: what each holds, and how gradients fit in."""

from collections.abc import Collection, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Holding(NamedTuple):
    """How a parameter is spread over the processes.

    Attributes:
        copies: How many processes hold the same entries.
        averaged: Whether gradients are to be averaged here; those of shards come averaged.
    """

    copies: int = 1
    averaged: bool = True


def is_sharded(tensor: Any) -> bool:
    """Say whether a tensor is a DTensor, without importing what makes them."""
    return hasattr(tensor, "device_mesh")


def hold(param: Any, n_processes: int) -> Holding:
    """Say how a parameter is spread over so many processes."""
    if not is_sharded(param):
        return Holding(n_processes)
    mesh, spread = param.device_mesh, enumerate(param.placements)
    parts = prod(mesh.size(i) for i, placement in spread if not placement.is_replicate())
    return Holding(n_processes // parts, averaged=False)


def local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, detached."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]  # a tensor, seen as Any above
    part: Any = tensor.to_local()
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]  # likewise


def own_part(grad: Any, param: Any) -> Any:
    """Return the part of a gradient that this process holds of the parameter; None stays None."""
    if type(grad) is Tensor or not is_sharded(grad) or not is_sharded(param):
        return grad
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local(grad)


def check_placed(params: Sequence[Any]) -> None:
    """Raise if a gradient is not spread as its parameter: ``fully_shard`` did not see its use.

    Raises:
        RuntimeError: If so.
    """
    for param in params:
        grad = param.grad
        if is_sharded(grad) and grad.placements != param.placements:
            raise RuntimeError(
                "MTLOptimizer: a loss uses a sharded parameter outside the forward pass of its "
                "module, where fully_shard adds gradients up wrongly; compute that term inside "
                "the module's forward, or use weight decay."
            )


def check_arrived(found: Collection[int], params: Sequence[Tensor]) -> None:
    """Raise if a pass left no gradient in any sharded parameter: ``fully_shard`` keeps them back.

    Args:
        found: Numbers of the parameters that have got one.
        params: All parameters.

    Raises:
        RuntimeError: If so.
    """
    shards = [n for n, param in enumerate(params) if param.requires_grad and is_sharded(param)]
    if shards and not any(number in found for number in shards):
        raise RuntimeError(
            "MTLOptimizer: a backward pass left no gradient in any sharded parameter; fully_shard "
            "holds them back after set_requires_gradient_sync(False), so keep it True (Accelerate "
            "does in GradientAccumulationPlugin(num_steps, sync_each_batch=True))."
        )


def placed_like(grad: Tensor, param: Any) -> Tensor:
    """Return the local part of a gradient as the gradient of the parameter."""
    if not is_sharded(param) or is_sharded(grad):
        return grad
    from torch.distributed.tensor import DTensor  # takes long to import

    return DTensor.from_local(
        grad,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def part_of(whole: Tensor, param: Any, n_leading: int = 0) -> Tensor:
    """Return what this process holds of a tensor that all have.

    Args:
        whole: Of the parameter's shape, with so many axes before.
        param: The parameter; whatever is no DTensor is held whole.
        n_leading: Number of further axes, 0 or 1.
    """
    if not is_sharded(param) or whole.shape[n_leading:] != param.shape:
        return whole
    if n_leading:
        return torch.stack([part_of(row, param) for row in whole])
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local(everywhere.redistribute(mesh, param.placements))


def whole_of(part: Tensor, param: Any, n_leading: int = 0) -> Tensor:
    """Gather what the processes hold of a tensor; the arguments are as in ``part_of``."""
    if not is_sharded(param) or part.shape[n_leading:] != local(param).shape:
        return part
    if n_leading:
        return torch.stack([whole_of(row, param) for row in part])
    placed: Any = placed_like(part, param)
    return placed.full_tensor()  # type: ignore[no-any-return]  # a tensor, seen as Any above
