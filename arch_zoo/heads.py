"""Heads for dense tasks: ASPP, the head of DeepLabv3, feature pyramids, resizing."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from arch_zoo.tensors import leaves_of

Norm: TypeAlias = Callable[[int], nn.Module]
Size: TypeAlias = tuple[int, int] | torch.Size


def resized(x: Tensor, size: Size) -> Tensor:
    """Return maps of this size, by linear interpolation."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return functional.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def enlarged(x: Tensor, scale: int) -> Tensor:
    """Return maps so many times as large, by linear interpolation."""
    return resized(x, (scale * x.shape[-2], scale * x.shape[-1]))


def conv_norm(
    channels: int, kernel: int = 3, dilation: int = 1, norm: Norm = nn.BatchNorm2d
) -> nn.Sequential:
    """Return a convolution of any number of input channels, a norm and a ReLU; sizes are kept."""
    conv = nn.LazyConv2d(
        channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False
    )
    return nn.Sequential(conv, norm(channels), nn.ReLU())


class ASPP(nn.Module):
    """Convolutions of several rates side by side, and the mean of the map, joined.

    Args:
        channels: Of each branch and of the result.
        rates: Dilations of the 3 x 3 convolutions: 12, 24, 36 for maps at an eighth of the picture.
        dropout: After the joining convolution.
        norm: Makes the norms from the number of channels. The norm after the mean sees a single
            position: with batch norm, training needs two examples at least.

    Source:
        Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017.

    Example:
        >>> ASPP(8, rates=(2, 4))(torch.ones(2, 3, 9, 7)).shape
        torch.Size([2, 8, 9, 7])
    """

    def __init__(
        self,
        channels: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        branches = [conv_norm(channels, 1, norm=norm)]
        branches += [conv_norm(channels, 3, rate, norm) for rate in rates]
        self.branches = nn.ModuleList(branches)
        self.pooled = conv_norm(channels, 1, norm=norm)
        self.join = nn.Sequential(*conv_norm(channels, 1, norm=norm), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Return maps ``[batch, channels, height, width]`` of the size of those given."""
        mean = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        y: Tensor = self.join(torch.cat([*(branch(x) for branch in self.branches), mean], dim=1))
        return y


class DeepLabHead(nn.Sequential):
    """ASPP, a convolution, and one that gives the outputs: the head of DeepLabv3.

    Args:
        outputs: Channels of the output.
        channels: Of all layers in between.
        rates: Of the :class:`ASPP`.
        norm: Makes the norms.

    Source:
        Chen et al., Rethinking Atrous Convolution for Semantic Image Segmentation, 2017.

    Example:
        >>> DeepLabHead(5, channels=8)(torch.ones(2, 3, 9, 7)).shape
        torch.Size([2, 5, 9, 7])
    """

    def __init__(
        self,
        outputs: int,
        channels: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__(
            ASPP(channels, rates, norm=norm),
            *conv_norm(channels, norm=norm),
            nn.Conv2d(channels, outputs, 1),
        )


class FPN(nn.Module):
    """A feature pyramid: each map of one width, with what coarser ones see added to it.

    Args:
        channels: Of all maps.

    Source:
        Lin et al., Feature Pyramid Networks for Object Detection, CVPR 2017.

    Example:
        >>> maps = [torch.ones(2, 4, 8, 8), torch.ones(2, 6, 4, 4)]
        >>> [tuple(y.shape) for y in FPN(5, n=2)(maps)]
        [(2, 5, 8, 8), (2, 5, 4, 4)]
    """

    def __init__(self, channels: int = 256, n: int = 4) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.LazyConv2d(channels, 1) for _ in range(n))
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(n))

    def forward(self, maps: Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
        """Return maps ``[batch, channels, ...]`` from finest to coarsest, as those given.

        Raises:
            ValueError: If their number is another.
        """
        given = list(leaves_of(maps))
        if len(given) != len(self.lateral):
            raise ValueError(
                f"FPN: `maps` must be {len(self.lateral)}, from finest to coarsest, got "
                f"{len(given)}."
            )
        found: list[Tensor] = []
        for lateral, x in zip(reversed(self.lateral), reversed(given), strict=True):
            y = lateral(x)
            if found:
                y = y + functional.interpolate(found[-1], y.shape[-2:], mode="nearest")
            found.append(y)
        return [smooth(y) for smooth, y in zip(self.smooth, reversed(found), strict=True)]


class FPNHead(nn.Module):
    """A head on a pyramid: all maps at the size of the finest, joined, and two layers.

    Args:
        outputs: Channels of the output.
        channels: Hidden channels.
        norm: Makes the norm.

    Example:
        >>> maps = {"fine": torch.ones(2, 4, 8, 8), "coarse": torch.ones(2, 6, 4, 4)}
        >>> FPNHead(3, channels=5)(maps).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, outputs: int, channels: int = 256, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *conv_norm(channels, 1, norm=norm), nn.Conv2d(channels, outputs, 1)
        )

    def forward(self, maps: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Return maps of the size of the first one given."""
        finest, *others = leaves_of(maps)
        joined = torch.cat([finest, *(resized(x, finest.shape[-2:]) for x in others)], dim=1)
        y: Tensor = self.layers(joined)
        return y


class Resized(nn.Module):
    """A head whose output is enlarged, by linear interpolation.

    Args:
        head: Any head that returns maps.
        scale: By how much.

    Example:
        >>> Resized(nn.Conv2d(3, 2, 1), 4)(torch.ones(1, 3, 5, 6)).shape
        torch.Size([1, 2, 20, 24])
    """

    def __init__(self, head: nn.Module, scale: int) -> None:
        super().__init__()
        self.head = head
        self.scale = scale

    def forward(self, x: Any) -> Tensor:
        return enlarged(self.head(x), self.scale)


class Residual(nn.Module):
    """Two convolutions with norms, and a shortcut that fits the channels.

    Args:
        channels: Of the result.
        norm: Makes the norms.
    """

    def __init__(self, channels: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_norm(channels, norm=norm), *conv_norm(channels, norm=norm))
        del self.body[-1]
        self.shortcut = nn.Sequential(nn.LazyConv2d(channels, 1, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))
