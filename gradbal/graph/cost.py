"""What a pass through the trunk costs, by count, and how much memory there is."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, Node

from gradbal._utils import torch_private
from gradbal._utils.torch_private import LEAF
from gradbal.graph.walk import Boundary


class Rates(NamedTuple):
    """What things cost on a kind of device, in seconds.

    Fitted on two CPUs' cores; those of accelerators are estimates that have not been measured.

    Attributes:
        node: A node of the graph, gone through with one task.
        batched: A node gone through with several tasks at once.
        flop: A multiplication or addition.
        entry: An entry of a gradient, written and read.
        image: A multiplication or addition in a convolution for several tasks at once, over one.
    """

    node: float
    batched: float
    flop: float
    entry: float
    image: float


CPU = Rates(node=20e-6, batched=80e-6, flop=1 / 50e9, entry=1 / 1e9, image=1.7)
ACCELERATOR = Rates(node=10e-6, batched=40e-6, flop=1 / 20e12, entry=1 / 200e9, image=1.5)

PRODUCTS = {"MmBackward0": 0, "AddmmBackward0": 1, "BmmBackward0": 0, "BaddbmmBackward0": 1}
CONVOLUTION = "ConvolutionBackward0"
CACHES = ("active_file ", "inactive_file ")


class Work(NamedTuple):
    """What one task's pass through a piece of the graph consists of.

    Attributes:
        nodes: Number of nodes.
        flops: Multiplications and additions in products of matrices.
        image_flops: Those in convolutions.
        entries: Entries of gradients of activations.
        largest: Most entries of a gradient of one activation.
    """

    nodes: int = 0
    flops: float = 0.0
    image_flops: float = 0.0
    entries: int = 0
    largest: int = 0

    def seconds(self, rates: Rates, n_tasks: int, *, batched: bool) -> float:
        """Estimate the time of all tasks' passes, one by one or all at once."""
        image = self.image_flops * (rates.image if batched else 1)
        each = (self.flops + image) * rates.flop + self.entries * rates.entry
        nodes = self.nodes * (rates.batched if batched else n_tasks * rates.node)
        return nodes + n_tasks * each


def count(top: Boundary) -> Work:
    """Count what a pass from here down to all parameters consists of."""
    stack: list[Any] = list({edge.node for edge in top})
    seen = set(stack)
    n_nodes, flops, image, entries, largest = 0, 0.0, 0.0, 0, 0
    while stack:
        node = stack.pop()
        size = math.prod(_shape(node))
        n_nodes += 1
        kind = type(node).__name__
        if kind == CONVOLUTION:
            image += _in_convolution(node, size)
        elif kind in PRODUCTS:
            flops += _in_product(node, size, PRODUCTS[kind])
        if type(node) is not LEAF:
            entries, largest = entries + size, max(largest, size)
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return Work(n_nodes, flops, image, entries, largest)


def entries_at(edges: Iterable[GradientEdge]) -> int:
    """Return the number of entries of the gradients that arrive at some edges."""
    return sum(math.prod(_shape(edge.node, edge.output_nr)) for edge in edges)


def _shape(node: Any, output: int = 0) -> Sequence[int]:
    found: Sequence[int] = torch_private.output_metadata(node)[output].shape
    return found


def _in_product(node: Node, size: int, first: int) -> float:
    """Count for the operands that need a gradient, each as much as the product itself."""
    operands = node.next_functions[first : first + 2]
    inner = [
        _shape(child, i)[axis] for (child, i), axis in zip(operands, (-1, -2), strict=True) if child
    ]
    return 2.0 * size * len(inner) * inner[0] if inner else 0.0


def _in_convolution(node: Any, size: int) -> float:
    (image, _), (weight, i), *_ = node.next_functions
    shape = _shape(weight, i) if weight is not None else torch_private.saved(node, "weight").shape
    windows = math.prod(shape[1:])
    return 2.0 * size * windows * ((image is not None) + (weight is not None))


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory could be had, or None if nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    if device.type != "cpu":
        return None
    found = [_available(), _left_in_group()]
    return min((number for number in found if number is not None), default=None)


def _available() -> int | None:
    """Return what the operating system would give (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(sizes[0]) if sizes else None


def _left_in_group() -> int | None:
    """Return what the limit of the container leaves (Linux, control groups); caches can go."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # there is none, or it says "max"
        return None
    caches = sum(int(line.split()[1]) for line in lines if line.startswith(CACHES))
    return max(0, limit - used + caches)
