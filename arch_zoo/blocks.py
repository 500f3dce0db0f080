"""Convolutions sized by their first input: masks and refinements of MTAN."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter

REDUCTION = 4  # of the bottleneck in a residual refinement, as in the authors' code


class Attention(nn.Module):
    """Two convolutions over single positions that make a mask between 0 and 1."""

    def __init__(self, reduction: int) -> None:
        super().__init__()
        self.reduction = reduction
        self.squeeze = LazyConvNorm(1)
        self.excite = LazyConvNorm(1)

    def forward(self, x: Tensor, channels: int) -> Tensor:
        """Return a mask of so many channels."""
        hidden = torch.relu(self.squeeze(x, max(1, channels // self.reduction)))
        return torch.sigmoid(self.excite(hidden, channels))


class Bottleneck(nn.Module):
    """A residual block to so many channels: single positions, neighbours, single positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([LazyConvNorm(1), LazyConvNorm(3), LazyConvNorm(1)])
        self.shortcut = LazyConvNorm(1)

    def forward(self, x: Tensor, channels: int) -> Tensor:
        reduce, mix, expand = self.body
        hidden = torch.relu(reduce(x, max(1, channels // REDUCTION)))
        hidden = torch.relu(mix(hidden, hidden.shape[1]))
        return torch.relu(expand(hidden, channels) + self.shortcut(x, channels))


class Convolution(nn.Module):
    """A convolution over neighbours to so many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = LazyConvNorm(3)

    def forward(self, x: Tensor, channels: int) -> Tensor:
        return torch.relu(self.body(x, channels))


class ConvNorm(nn.Module):
    """Convolution and batch norm, channels first."""

    weight: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LazyBatchNorm1d()

    def forward(self, x: Tensor, channels: int) -> Tensor:
        """Convolve ``[batch, channels, positions ...]``; vectors have no neighbours."""
        if x.ndim == 2:
            y = functional.linear(x, self.weight)
        else:
            convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[x.ndim - 3]
            y = convolve(x, self.weight, padding=self.weight.shape[-1] // 2)
        normed: Tensor = self.norm(y.reshape(*y.shape[:2], -1))
        return normed.reshape(y.shape)


class LazyConvNorm(LazyModuleMixin, ConvNorm):
    """A :class:`ConvNorm` whose first input sets the number of axes and all channels.

    Args:
        kernel: Width of the convolution along every axis of positions; odd.
    """

    cls_to_become = ConvNorm

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        # a parameter at run time, though not to the type checker
        self.weight = UninitializedParameter()  # type: ignore[assignment]

    def initialize_parameters(self, x: Tensor, channels: int) -> None:
        if isinstance(self.weight, UninitializedParameter):
            self.weight.materialize((channels, x.shape[1], *[self.kernel] * (x.ndim - 2)))
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
