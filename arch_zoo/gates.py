"""Gates: what they read, and the softmax over experts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arch_zoo.tensors import pooled


@dataclass(frozen=True)
class Gate:
    """How the gates of a model read their input and how deep they are.

    Args:
        input: ``"pool"`` reads the mean over positions, ``"flatten"`` all entries, which fixes the
            input size, ``"given"`` the ``gate_input`` of the call; or a function of the features.
        hidden: Widths of hidden layers, each followed by a ReLU.
        bias: Give the last layer a bias.
        detach_input: Keep the gates' gradient out of what they read.

    Raises:
        ValueError: If the input is none of these.
        TypeError: If it is a module, whose parameters would belong to no model.

    Example:
        >>> Gate("pool").read(torch.ones(2, 3, 8, 8), None).shape
        torch.Size([2, 3])
    """

    input: str | Callable[[Tensor], Tensor] = "pool"
    hidden: tuple[int, ...] = ()
    bias: bool = True
    detach_input: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.input, nn.Module):
            raise TypeError(
                "Gate: `input` must be a name or a function without parameters, got "
                f"{type(self.input).__name__}. Put a module into `stem`."
            )
        if not callable(self.input) and self.input not in ("pool", "flatten", "given"):
            raise ValueError(
                "Gate: `input` must be 'pool', 'flatten', 'given' or a function, "
                f"got {self.input!r}."
            )

    def read(self, x: Tensor, gate_input: Tensor | None) -> Tensor:
        """Return what the gates see, shape ``[batch, width]``.

        Raises:
            ValueError: If ``gate_input`` is missing, or given to gates that read something else.
            TypeError: If it is not of floating point.
        """
        if (self.input == "given") == (gate_input is None):
            must = "be passed to" if gate_input is None else "be left out with"
            raise ValueError(f"Gate: `gate_input` must {must} gates that read {self.input!r}.")
        if gate_input is not None:
            u = gate_input
        elif callable(self.input):
            u = self.input(x)
        else:
            u = pooled(x) if self.input == "pool" else x.flatten(1)
        if not u.is_floating_point():
            raise TypeError(
                f"Gate: `input` must give floating point, got {u.dtype}. "
                "Embed the input in a `stem`, or read something else."
            )
        return u.detach() if self.detach_input else u

    def layers(self, out: int, bound: float = 0.0) -> nn.Sequential:
        """Return a network from any width to ``out``, its last layer uniform in ``±bound``."""
        stages: list[nn.Module] = []
        for width in self.hidden:
            stages += [nn.LazyLinear(width), nn.ReLU()]
        return nn.Sequential(*stages, UniformLinear(out, self.bias, bound))


POOLED = Gate("pool")


class UniformLinear(nn.LazyLinear):
    """A linear layer of any input width that starts uniform in ``±bound``; zero by default."""

    def __init__(self, out_features: int, bias: bool = True, bound: float = 0.0) -> None:
        super().__init__(out_features, bias=bias)
        self.bound = bound

    def reset_parameters(self) -> None:
        if self.in_features != 0:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -self.bound, self.bound)


class SoftmaxGate(nn.Module):
    """Weights of experts that sum to one, equal at the start.

    Args:
        gate: What it reads and its depth.
        n: Number of experts.

    Example:
        >>> weights, penalty = SoftmaxGate(Gate(), 2)(torch.ones(1, 3))
        >>> weights.tolist(), penalty
        ([[0.5, 0.5]], None)
    """

    def __init__(self, gate: Gate, n: int) -> None:
        super().__init__()
        self.layers = gate.layers(n)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights, shape ``[batch, n]``, and the auxiliary loss, here none."""
        return torch.softmax(self.layers(u), dim=-1), None
