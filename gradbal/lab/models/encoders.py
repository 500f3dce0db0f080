"""Encoders as stages, and heads: plain modules such as the problems were published with."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor, nn

Factory = Callable[[], nn.Module]
Stages = tuple[Factory, ...]


def mlp(inputs: int, *widths: int) -> Stages:
    """Return stages for vectors, one layer each."""
    return tuple(partial(_dense, *pair) for pair in pairwise((inputs, *widths)))


def mlp_head(inputs: int, hidden: int, outputs: int) -> Factory:
    """Return a maker of heads with one hidden layer."""
    return lambda: nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def linear_head(inputs: int, outputs: int) -> Factory:
    """Return a maker of heads without hidden layer."""
    return lambda: nn.Linear(inputs, outputs)


def lenet() -> Stages:
    """Return LeNet for pictures of 28 x 28 with one channel; its output has 50 features."""
    return (
        lambda: nn.Sequential(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        lambda: nn.Sequential(nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU()),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(320, 50), nn.ReLU()),
    )


def cnn() -> Stages:
    """Return nine layers for pictures of 64 x 64 with three channels; 512 features come out."""
    pairs = pairwise((3, 64, 128, 256, 512))
    return (
        *(partial(_down, *pair) for pair in pairs),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), _dense(512, 512)),
    )


def segnet() -> Stages:
    """Return five stages down and five up; pictures go in, 64 features of each pixel come out.

    Unlike the published SegNet the way up does not know which pixel was the largest on the way
    down: a stage hands on one tensor, so that architectures can stand between any two of them.
    """
    down, up = (3, 64, 128, 256, 512, 512), (512, 512, 256, 128, 64, 64)
    return (
        *(partial(_down, *pair) for pair in pairwise(down)),
        *(partial(_up, *pair) for pair in pairwise(up)),
    )


def pixel_head(outputs: int) -> Factory:
    """Return a maker of heads that read the 64 features of :func:`segnet`."""
    return lambda: nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, outputs, 1))


def resnet18() -> Stages:
    """Return ResNet-18 for pictures with three channels; 512 features come out.

    It starts from random weights, where published figures start from those of ImageNet.
    """
    return (
        _stem,
        *(partial(_level, *pair) for pair in pairwise((64, 64, 128, 256, 512))),
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def dilated_resnet50() -> Stages:
    """Return ResNet-50 for pictures with three channels; 2048 maps an eighth as large come out.

    The last two levels are dilated and keep the size. It starts from random weights, where
    published figures start from those of ImageNet.
    """
    return (
        _stem,
        partial(_bottlenecks, 64, 64, 3, 1, 1),
        partial(_bottlenecks, 256, 128, 4, 2, 1),
        partial(_bottlenecks, 512, 256, 6, 1, 2),
        partial(_bottlenecks, 1024, 512, 3, 1, 4),
    )


def deeplab_head(outputs: int, scale: int = 8) -> Factory:
    """Return a maker of heads of DeepLabv3, which enlarge their outputs by a factor.

    They are those of arch_zoo, imported by name. A norm in them sees one position of each picture,
    so training takes two pictures at least.
    """

    def make() -> nn.Module:
        zoo = import_module("arch_zoo")
        head: nn.Module = zoo.Resized(zoo.DeepLabHead(outputs), scale)
        return head

    return make


class Residual(nn.Module):
    """Two convolutions and a way around them; it halves the picture where the width changes.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential()
        if stride > 1:
            self.around.append(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))
            self.around.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


class Bottleneck(nn.Module):
    """A 3 x 3 convolution between two of 1 x 1, and a way around them.

    Args:
        inputs: Channels that come in.
        width: Channels of the 3 x 3 convolution; four times as many go out.
        stride: Of the 3 x 3 convolution.
        dilation: Of the 3 x 3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = nn.Sequential()
        if inputs != outputs:
            self.around.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.around.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


class Embedded(nn.Module):
    """Reads rows of numbers that are followed by codes; every code has a vector of its own.

    Args:
        numbers: How many numbers come first.
        sizes: Codes of each column after them; they count from 0.
        width: Of a vector.
    """

    def __init__(self, numbers: int, sizes: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.numbers, self.outputs = numbers, numbers + len(sizes) * width
        self.table = nn.Embedding(sum(sizes), width)
        self.starts: Tensor
        starts = torch.tensor((0, *sizes[:-1])).cumsum(0)
        self.register_buffer("starts", starts, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        numbers, codes = x[:, : self.numbers], x[:, self.numbers :].long() + self.starts
        return torch.cat([numbers, self.table(codes).flatten(1)], dim=1)


def _dense(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def _block(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(_block(inputs, outputs), _block(outputs, outputs), nn.MaxPool2d(2))


def _up(inputs: int, outputs: int) -> nn.Module:
    larger = nn.Upsample(scale_factor=2)
    return nn.Sequential(larger, _block(inputs, outputs), _block(outputs, outputs))


def _stem() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )


def _bottlenecks(inputs: int, width: int, blocks: int, stride: int, dilation: int) -> nn.Module:
    """Return the blocks of a level, of which the first has the dilation of the level before."""
    first = Bottleneck(inputs, width, stride, max(1, dilation // 2))
    others = (Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


def _level(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(Residual(inputs, outputs), Residual(outputs, outputs))
