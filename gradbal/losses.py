"""What users give as losses, read into one form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Losses = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


@dataclass
class Batch:
    """The losses of one batch.

    Attributes:
        tasks: Numbers of the present tasks, ascending as given.
        edges: Where their losses stand in the graph.
        values: The losses themselves, shape ``[m]``, detached, float64, where they are.
        likes: For each loss a detached tensor of its dtype and device.
    """

    tasks: list[int]
    edges: list[GradientEdge]
    values: Tensor
    likes: list[Tensor]

    def by_task(self) -> dict[int, Tensor]:
        """Return the losses, by the number of their task."""
        return dict(zip(self.tasks, self.values, strict=True))

    def seeds(self, weights: Tensor | None) -> list[Tensor]:
        """Return the initial gradient of each loss: its weight, or 1.

        Args:
            weights: Shape ``[m]``, or 0-dim for the same one everywhere.
        """
        if weights is None:
            return [torch.ones_like(like) for like in self.likes]
        pairs = zip(weights.expand(len(self.likes)), self.likes, strict=True)
        return [weight.to(like.device, like.dtype).reshape(like.shape) for weight, like in pairs]


def named_losses(losses: Losses) -> tuple[list[str] | None, list[Tensor]]:
    """Return the names, if they were given, and the losses as a list.

    Raises:
        TypeError: If the losses are no list, tuple, mapping or 1-D tensor of tensors.
        ValueError: If there is none, or one is not a scalar.
    """
    names: list[str] | None = None
    if isinstance(losses, Mapping):
        names = list(losses)
        for given in names:
            if not isinstance(given, str):
                raise TypeError(f"Losses: task names must be strings, got {given!r}.")
        found: list[Any] = list(losses.values())
    elif isinstance(losses, Tensor):
        if losses.ndim != 1:
            raise TypeError(
                f"Losses: expected one loss per task, got a tensor of shape {list(losses.shape)}; "
                "give a list, a mapping or a 1-D tensor, and do not add the losses up."
            )
        found = _unstacked(losses)
    elif isinstance(losses, Sequence) and not isinstance(losses, str | bytes):
        found = list(losses)
    else:
        raise TypeError(
            "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, "
            f"got {type(losses).__name__}."
        )
    if not found:
        raise ValueError("Losses: expected at least one loss, got none.")
    for position, loss in enumerate(found):
        name = repr(names[position]) if names else str(position)
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"Losses: the loss of task {name} must be a tensor, got {type(loss).__name__}."
            )
        if loss.numel() != 1:
            raise ValueError(
                f"Losses: the loss of task {name} must be a scalar, got shape {list(loss.shape)}; "
                "reduce it with .mean() or .sum()."
            )
        if not loss.is_floating_point():
            raise TypeError(
                f"Losses: the loss of task {name} must be a real floating-point tensor, "
                f"got {loss.dtype}."
            )
    return names, found


def read_batch(losses: Sequence[Tensor], tasks: Sequence[int]) -> Batch:
    """Keep the losses that have a graph; the others are absent.

    Args:
        losses: Scalars.
        tasks: The number of each one's task.
    """
    edges = [_edge(loss) if loss.requires_grad else None for loss in losses]
    present = [i for i, edge in enumerate(edges) if edge is not None]
    detached = [losses[i].detach().reshape(()) for i in present]
    device = detached[0].device if detached else torch.device("cpu")
    wide = torch.float32 if device.type == "mps" else torch.float64
    return Batch(
        tasks=[tasks[i] for i in present],
        edges=[edge for edge in edges if edge is not None],
        values=torch.stack([loss.to(device, wide) for loss in detached])
        if present
        else torch.empty(0),
        likes=[losses[i].detach() for i in present],
    )


def _edge(loss: Tensor) -> GradientEdge | None:
    """Return where a loss stands, looking through the stacking of several losses."""
    edge = get_gradient_edge(loss)
    kind = edge.node.name()
    if kind not in ("UnbindBackward0", "SelectBackward0"):
        return edge
    below = edge.node.next_functions[0][0]
    if below is None or below.name() != "StackBackward0" or loss.ndim != 0:
        return edge
    number = edge.output_nr
    if kind == "SelectBackward0":
        number = edge.node._saved_index % 2**64  # type: ignore[attr-defined]  # of SelectBackward0
        number -= 2**64 if number >= 2**63 else 0  # counted from the end
    node, output = below.next_functions[number]
    return None if node is None else GradientEdge(node, output)


def _unstacked(losses: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        return list(losses.unbind())
