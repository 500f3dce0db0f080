"""Numbers that are the same where something is the same, and nearly never elsewhere."""

import hashlib

import torch
from torch import Tensor

from gradbal._utils.dtensor import is_sharded

STRIDE = 2**16  # entries that are summed at a time


def hashed(text: str) -> float:
    """Return 52 bits that stand for a text; exact in float64."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 12)


def fingerprint(param: Tensor) -> tuple[int, int]:
    """Return numbers that are the same for replicas, and for shards of one parameter."""
    shape = f"{tuple(param.shape)} {param.dtype} {param.requires_grad}"
    return int(hashed(shape)), 0 if is_sharded(param) else digest(param)


def digest(tensor: Tensor | None) -> int:
    """Return an integer made of a tensor's bits and their places, whatever hardware adds them."""
    if tensor is None:
        return -1
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return digest(tensor.values()) ^ digest(tensor.indices())
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.numel():
        return 0
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.contiguous().view(kinds[tensor.element_size()]).flatten()
    odd = torch.arange(1, 2 * min(STRIDE, len(bits)), 2, device=bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for i, piece in enumerate(torch.split(bits, STRIDE)):
        total += (2 * i + 1) * (piece * odd[: len(piece)]).sum()
    return int(total)
