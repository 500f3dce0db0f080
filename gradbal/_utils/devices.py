"""Small tensors between host and device, without waiting where that is possible."""

from torch import Tensor, device


def on_device(tensor: Tensor, where: device) -> Tensor:
    """Return a small tensor on a device.

    From the host to a CUDA card it goes through pinned memory, so that the host does not wait.
    """
    if where.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(where, non_blocking=True)
    return tensor.to(where)
