"""Small convolutional networks built as the well-known ones are, with all that makes them hard.

Each takes pictures of three channels, any size from 16 up, and returns a map of `WIDTH` channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 16


class BasicBlock(nn.Module):
    """Two convolutions and a sum, in place throughout; the shortcut changes size where needed."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # called twice
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """A stem with a max-pool, then four blocks, two of which halve the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, WIDTH, 2), BasicBlock(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer2(self.layer1(x))  # type: ignore[no-any-return]


def conv_bn(
    inputs: int,
    outputs: int,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: nn.Module | None = None,
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([] if act is None else [act]))


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; the sum where the shape allows it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self.use_sum = stride == 1 and inputs == outputs
        layers = [] if expand == 1 else [conv_bn(inputs, hidden, act=nn.ReLU6(inplace=True))]
        self.conv = nn.Sequential(
            *layers,
            conv_bn(hidden, hidden, 3, stride, groups=hidden, act=nn.ReLU6(inplace=True)),
            conv_bn(hidden, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_sum else self.conv(x)  # type: ignore[no-any-return]


class MobileNetV2(nn.Module):
    """Depthwise convolutions, ReLU6 in place, inverted residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8, 3, 2, act=nn.ReLU6(inplace=True)),
            InvertedResidual(8, 8, 1, 1),
            InvertedResidual(8, 12, 2, 3),
            InvertedResidual(12, 12, 1, 3),
            conv_bn(12, WIDTH, act=nn.ReLU6(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """Scale the channels by what their means say: convolutions of one by one position."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.act = nn.SiLU(inplace=True)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(self.fc2(self.act(self.fc1(self.avgpool(x)))))
        return scale * x


class StochasticDepth(nn.Module):
    """Drop whole examples in training; `training` is read in Python, so only a leaf will do."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.p
        return x * kept / (1 - self.p)


class MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, kernel: int) -> None:
        super().__init__()
        hidden = 3 * inputs
        self.use_sum = stride == 1 and inputs == outputs
        self.block = nn.Sequential(
            conv_bn(inputs, hidden, act=nn.SiLU(inplace=True)),
            conv_bn(hidden, hidden, kernel, stride, groups=hidden, act=nn.SiLU(inplace=True)),
            SqueezeExcite(hidden, 4),
            conv_bn(hidden, outputs),
        )
        self.stochastic_depth = StochasticDepth(0.2)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.use_sum:
            result = self.stochastic_depth(result)
            result += x
        return result  # type: ignore[no-any-return]


class EfficientNet(nn.Module):
    """Squeeze-excite, SiLU, a five by five kernel, stochastic depth as a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_bn(3, 8, 3, 2, act=nn.SiLU(inplace=True)),
            MBConv(8, 8, 1, 3),
            MBConv(8, 12, 2, 5),
            MBConv(12, 12, 1, 3),
            conv_bn(12, WIDTH, act=nn.SiLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)  # type: ignore[no-any-return]


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "ResNet": ResNet,
    "MobileNetV2": MobileNetV2,
    "EfficientNet": EfficientNet,
}


def backbone(name: str, seed: int = 0) -> nn.Module:
    """Return one of them with seeded weights."""
    torch.manual_seed(seed)
    return BACKBONES[name]()


def pictures(batch: int = 2, size: tuple[int, int] = (20, 17), seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
