"""Gates: what they read, and the softmax over experts."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arch_zoo.layout import Width, axis_of
from arch_zoo.tensors import check_layout, pooled


@dataclass(frozen=True)
class Gate:
    """How the gates of a model read their input and how deep they are.

    Args:
        input: ``"pool"`` reads the mean over positions, ``"flatten"`` all entries, which fixes the
            input size, ``"given"`` the ``gate_input`` of the call; or a function of the features,
            or of the dict of named inputs where a batch has no others.
        mask: Name of the input that says which positions ``"pool"`` counts, ``[batch, positions]``;
            without such an input, or with None here, all count.
        layout: How the features lie that ``"pool"`` reads, such as ``"NHWC"``; by default derived
            from the last layer below, and without one (batch, tokens, channels) for three axes and
            channels second for more.
        start: ``"random"``, as a linear layer starts, or ``"even"``: equal weights for all experts.
            Experts that start equal, as pretrained ones do, stay equal under even gates.
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

    input: str | Callable[[Any], Tensor] = "pool"
    hidden: tuple[int, ...] = ()
    bias: bool = True
    detach_input: bool = False
    mask: str | None = "attention_mask"
    layout: str | None = None
    start: str = "random"

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
        if self.start not in ("random", "even"):
            raise ValueError(f"Gate: `start` must be 'random' or 'even', got {self.start!r}.")
        check_layout("Gate", self.layout)

    @property
    def takes(self) -> tuple[str, ...]:
        """Names of the inputs of a batch that it reads."""
        return (self.mask,) if self.mask is not None and self.input == "pool" else ()

    def read(
        self,
        x: Any,
        gate_input: Tensor | None,
        named: Mapping[str, Any] | None = None,
        width: Width | None = None,
    ) -> Tensor:
        """Return what the gates see, shape ``[batch, width]``.

        Args:
            x: Features, or the raw batch if there is no stem.
            gate_input: Of the call.
            named: Inputs of the call by name, which may hold the mask.
            width: Of the last layer below, which tells where the channels are.

        Raises:
            ValueError: If ``gate_input`` is missing, or given to gates that read something else, or
                the mask has another shape than the positions.
            TypeError: If it is not a tensor of floating point.
        """
        if (self.input == "given") == (gate_input is None):
            must = "be passed to" if gate_input is None else "be left out with"
            raise ValueError(f"Gate: `gate_input` must {must} gates that read {self.input!r}.")
        if gate_input is not None:
            u = gate_input
        elif callable(self.input):
            u = self.input((named or {}) if x is None else x)
        elif not isinstance(x, Tensor):
            raise TypeError(
                f"Gate: `input` {self.input!r} must read a tensor, got {type(x).__name__}. Put a "
                "`stem` below, pass a function of the batch, or read 'given'."
            )
        elif self.input == "pool":
            u = self._pooled(x, named or {}, width)
        else:
            u = x.flatten(1)
        if not u.is_floating_point():
            raise TypeError(
                f"Gate: `input` must give floating point, got {u.dtype}. "
                "Embed the input in a `stem`, or read something else."
            )
        return u.detach() if self.detach_input else u

    def _pooled(self, x: Tensor, named: Mapping[str, Any], width: Width | None) -> Tensor:
        mask = None if self.mask is None or x.ndim < 3 else named.get(self.mask)
        axis = axis_of("Gate", "the features", x, self.layout, width)
        try:
            return pooled(x, mask, axis=axis)
        except ValueError as error:
            raise ValueError(f"Gate: {error}") from None

    def layers(self, out: int, bound: float | None = None) -> nn.Sequential:
        """Return a network from any width to ``out``.

        Args:
            out: Its width.
            bound: The last layer starts uniform in ``±bound``; by default as ``start`` says.
        """
        if bound is None and self.start == "even":
            bound = 0.0
        stages: list[nn.Module] = []
        for width in self.hidden:
            stages += [nn.LazyLinear(width), nn.ReLU()]
        return nn.Sequential(*stages, UniformLinear(out, self.bias, bound))


POOLED = Gate("pool")


class UniformLinear(nn.LazyLinear):
    """A linear layer of any input width that starts uniform in ``±bound``.

    Without a bound it starts as a linear layer of torch does, in ``±1 / sqrt(in_features)``.
    """

    def __init__(self, out_features: int, bias: bool = True, bound: float | None = None) -> None:
        super().__init__(out_features, bias=bias)
        self.bound = bound

    def reset_parameters(self) -> None:
        if self.in_features != 0:
            bound = 1 / math.sqrt(self.in_features) if self.bound is None else self.bound
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -bound, bound)


class SoftmaxGate(nn.Module):
    """Weights of experts that sum to one.

    Args:
        gate: What it reads and its depth.
        n: Number of experts.

    Example:
        >>> weights, penalty = SoftmaxGate(Gate(start="even"), 2)(torch.ones(1, 3))
        >>> weights.tolist(), penalty
        ([[0.5, 0.5]], None)
    """

    def __init__(self, gate: Gate, n: int) -> None:
        super().__init__()
        self.layers = gate.layers(n)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return weights, shape ``[batch, n]``, and the auxiliary loss, here none."""
        return torch.softmax(self.layers(u), dim=-1), None
