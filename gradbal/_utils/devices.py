"""Small tensors between host and device, without waiting where that is possible."""

import torch
from torch import Tensor


def on_device(tensor: Tensor, where: torch.device) -> Tensor:
    """Return a small tensor on a device.

    From the host to a CUDA card it goes through pinned memory, so that the host does not wait.
    """
    if where.type == "cuda" and tensor.device.type == "cpu" and _has_card():
        return tensor.pin_memory().to(where, non_blocking=True)
    return tensor.to(where)


def _has_card() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
