"""What users give as losses, read into one form."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from gradbal._utils.devices import on_device
from gradbal._utils.dtensor import is_sharded
from gradbal._utils.torch_private import saved, signed

PIECES = ("UnbindBackward0", "SelectBackward0")  # what takes a piece out of a stack
Loss = Tensor | float | None  # None and 0 mark a task without a loss
Losses = Tensor | Iterable[Loss] | Mapping[str, Loss] | Mapping[int, Loss]
ABSENT = torch.zeros(())  # stands for the loss of a task that has none


@dataclass
class Batch:
    """The losses of one batch.

    Attributes:
        tasks: Numbers of the present tasks, ascending as given.
        losses: The losses of these tasks as given.
        joined: The same as one tensor with a graph, shape ``[m]``.
        values: The same detached, float64; with several processes, summands of their mean.
        shares: Factor on each loss, on the CPU, shape ``[m]``: with several processes its share
            of the samples times their number. None for 1.
    """

    tasks: list[int]
    losses: list[Tensor]
    joined: Tensor
    values: Tensor
    shares: Tensor | None = None

    @cached_property
    def edges(self) -> list[GradientEdge]:
        """Where each loss stands in the graph."""
        return [edge for loss in self.losses if (edge := _edge(loss)) is not None]

    def by_task(self) -> dict[int, Tensor]:
        """Return the losses, by the number of their task."""
        return dict(zip(self.tasks, self.values, strict=True))

    def seeds(self, weights: Tensor | None) -> Sequence[Tensor | None]:
        """Return the initial gradient of each loss: its weight, or None for 1.

        Args:
            weights: Shape ``[m]``, or 0-dim for the same one everywhere.
        """
        if weights is None and self.shares is None:
            return [None] * len(self.losses)
        pairs = zip(self.seed(weights).unbind(), self.losses, strict=True)
        return [weight.to(loss.device, loss.dtype).view_as(loss) for weight, loss in pairs]

    def seed(self, weights: Tensor | None) -> Tensor:
        """Return the initial gradient of the joined losses, likewise."""
        weights = self._shared(weights)
        if weights is None:
            return torch.ones_like(self.joined)
        return on_device(weights, self.joined.device).to(self.joined.dtype).expand_as(self.joined)

    @cached_property
    def n_elsewhere(self) -> int:
        """How many of the losses only other processes have."""
        return 0 if self.shares is None else int((self.shares == 0).sum())

    @property
    def elsewhere(self) -> bool:
        """Whether only other processes have losses."""
        return self.n_elsewhere == len(self.losses)

    def without(self, bad: Collection[int]) -> "Batch":
        """Return the batch without the losses at some positions."""
        kept = [i for i in range(len(self.losses)) if i not in bad]
        found = read_batch([self.losses[i] for i in kept], [self.tasks[i] for i in kept])
        return replace(
            found,
            values=self.values[kept],
            shares=None if self.shares is None else self.shares[kept],
        )

    def share(self, shares: Sequence[float], size: int) -> None:
        """Take a part in the mean over so many processes.

        Args:
            shares: Of the samples, times the number of processes; one per loss.
            size: The number of processes.
        """
        if any(share != 1 for share in shares):
            self.shares = torch.tensor(shares, dtype=torch.float64)
            self.values = self.values * self.shares.to(self.values)
        self.values = self.values / size

    def _shared(self, weights: Tensor | None) -> Tensor | None:
        if self.shares is None or weights is None:
            return weights if self.shares is None else self.shares
        return weights * self.shares.to(weights)


def named_losses(losses: Losses) -> tuple[list[str] | None, list[Tensor]]:
    """Return the names, if they were given, and the losses as a list.

    Raises:
        TypeError: If the losses are no mapping, iterable or 1-D tensor of tensors.
        ValueError: If there is none, or one is not a scalar.
    """
    names: list[str] | None = None
    if isinstance(losses, Mapping):
        for given in losses:
            if not isinstance(given, str | int):
                raise TypeError(
                    f"Losses: task names must be strings or integers, got {given!r}; name each "
                    "loss with one."
                )
        names = [str(given) for given in losses]
        found: list[Any] = list(losses.values())
    elif isinstance(losses, Tensor):
        if losses.ndim != 1:
            raise TypeError(
                f"Losses: expected one loss per task, got a tensor of shape {list(losses.shape)}; "
                "give a list, a mapping or a 1-D tensor, and do not add the losses up."
            )
        found = _unstacked(losses)
    elif isinstance(losses, Sequence | Iterator | ValuesView) and not isinstance(
        losses, str | bytes
    ):
        found = list(losses)
    else:
        raise TypeError(
            "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, "
            f"got {type(losses).__name__}."
        )
    if not found:
        raise ValueError("Losses: expected at least one loss, got none.")
    for i, loss in enumerate(found):
        if type(loss) is not Tensor:
            found[i] = ABSENT if _stands_for_none(loss) else _whole(loss)
    for position, loss in enumerate(found):
        if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
            _refuse(loss, repr(names[position]) if names else str(position))
    return names, found


def _whole(loss: Any) -> Any:
    return loss.full_tensor() if is_sharded(loss) else loss


def _stands_for_none(loss: object) -> bool:
    """Say whether something marks a task without a loss: None, or the number 0."""
    return loss is None or (isinstance(loss, int | float) and loss == 0)


def _refuse(loss: object, name: str) -> NoReturn:
    """Say what is wrong with a loss."""
    if isinstance(loss, int | float):
        raise TypeError(
            f"Losses: the loss of task {name} is the number {loss!r}, which has no graph (was it "
            "`.item()`?); give the tensor, or leave a task without labels out."
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"Losses: the loss of task {name} must be a tensor, got {type(loss).__name__}."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"Losses: the loss of task {name} must be a scalar, got shape {list(loss.shape)}; "
            "reduce it with .mean() or .sum()."
        )
    raise TypeError(
        f"Losses: the loss of task {name} must be a real floating-point tensor, got {loss.dtype}."
    )


def read_batch(losses: Sequence[Tensor], tasks: Sequence[int]) -> Batch:
    """Keep the losses that have a graph; the others are absent.

    Args:
        losses: Scalars.
        tasks: The number of each one's task.
    """
    present = [i for i, loss in enumerate(losses) if _has_graph(loss)]
    if not present:
        return Batch([], [], torch.empty(0), torch.empty(0))
    found = [losses[i] for i in present]
    device = found[0].device
    with torch.enable_grad():
        joined = torch.stack([_scalar(loss).to(device) for loss in found])
    wide = torch.float32 if device.type == "mps" else torch.float64
    return Batch([tasks[i] for i in present], found, joined, joined.detach().to(wide))


def placeholder(device: torch.device) -> Tensor:
    """Return what stands for the loss of a task that only other processes have."""
    return torch.zeros((), device=device, requires_grad=True)


def _scalar(loss: Tensor) -> Tensor:
    return loss.reshape(()) if loss.ndim else loss


def _has_graph(loss: Tensor) -> bool:
    """Say whether there is something to differentiate; a piece of a stack may have been added."""
    if not loss.requires_grad:
        return False
    node = loss.grad_fn
    return node is None or node.name() not in PIECES or _edge(loss) is not None


def _edge(loss: Tensor) -> GradientEdge | None:
    """Return where a loss stands, looking through the stacking of several losses."""
    edge = get_gradient_edge(loss)
    kind = edge.node.name()
    if kind not in PIECES:
        return edge
    below = edge.node.next_functions[0][0]
    if below is None or below.name() != "StackBackward0" or loss.ndim != 0:
        return edge
    number = edge.output_nr
    if kind == "SelectBackward0":
        number = signed(saved(edge.node, "index") % 2**64)  # negative: counted from the end
    node, output = below.next_functions[number]
    return None if node is None else GradientEdge(node, output)


def _unstacked(losses: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        return list(losses.unbind())
