"""What backbones do that makes tracing hard; each block stands second, after a convolution."""

import math
import random

import torch
from backbones import StochasticDepth
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Eight channels in, eight out; with a submodule, so that a trace looks into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)


# ------------------------------------------------------------------------------ traced as it is


class Sizes(Block):
    """Reads sizes where a trace can follow: `math`, unpacking, a range, a list of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        z = self.conv(x).view(batch, channels, -1) / math.sqrt(x.size(1))
        z = z.view(batch, channels, height, width) + torch.arange(x.shape[-1])
        return torch.stack([layer(z) for layer in self.more]).sum(0)


class Optional(Block):
    """An argument that nobody gives."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        z = scale * self.conv(x)
        return z if mask is None else z * mask


class Dropouts(Block):
    """Functions that are told the mode."""

    def forward(self, x: Tensor) -> Tensor:
        z = functional.dropout(self.conv(x), 0.4, self.training)
        z = functional.dropout2d(z, 0.3, training=self.training, inplace=True)
        z = functional.alpha_dropout(z, 0.2, self.training)
        return functional.feature_alpha_dropout(z, 0.2, self.training)


class Standardised(Block):
    """A convolution as a function of another weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        return functional.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), padding=1)


class SameConv(nn.Conv2d):
    """Pads by the size of its input, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        pad = [max(k - s + x.shape[-1] % s, 0) for k, s in zip((3, 3), self.stride, strict=True)]
        return super().forward(functional.pad(x, [pad[0] // 2, pad[0] - pad[0] // 2] * 2))


class Subclass(Block):
    def __init__(self) -> None:
        super().__init__()
        self.same = SameConv(8, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.same(self.conv(x))  # type: ignore[no-any-return]


class NormAct(nn.BatchNorm2d):
    """A subclass of a layer that has submodules, and reads the mode."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(super().forward(x))
        return 2 * z if self.training else z  # type: ignore[no-any-return]


class WithNormAct(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = NormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))  # type: ignore[no-any-return]


class Twice(Block):
    """One module, two calls."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))  # type: ignore[no-any-return]


class Tied(Block):
    """Two modules, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 8, 3, padding=1)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x))  # type: ignore[no-any-return]


class Drops(Block):
    """Stochastic depth as a module, behind which nothing can be told from the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticDepth(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(x))  # type: ignore[no-any-return]


class PreActivation(Block):
    """The sum reads what the activation wrote into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(x)) + x  # type: ignore[no-any-return]


class Methods(Block):
    """Writes by methods and functions, some of them as statements."""

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(x)
        z.mul_(2.0).clamp_(max=3.0)
        kept = z
        functional.relu(z, inplace=True)
        z = 2.0 * functional.leaky_relu_(z - 1, 0.1)
        z = torch.relu_(z + 1) * 3.0
        z += kept
        return z.add_(x, alpha=0.5)


class Parametrized(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Halves(Block):
    """Two values, and whole numbers."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv(x)
        return z.relu(), z.argmax(1, keepdim=True)


class Where(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).argmax(1, keepdim=True)  # type: ignore[no-any-return]


class Nested(Block):
    def __init__(self) -> None:
        super().__init__()
        self.halves, self.where = Halves(), Where()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.halves(self.conv(x))
        return first + second * self.where(x)  # type: ignore[no-any-return]


TRACED: dict[str, type[Block]] = {
    block.__name__: block
    for block in (
        *(Sizes, Optional, Dropouts, Standardised, Subclass, WithNormAct, Twice, Tied, Drops),
        *(PreActivation, Methods, Parametrized, Nested),
    )
}

# ---------------------------------------------------------------------------------- refused


class ByValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


class ByParity(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.shape[-1] % 2 else x


class Asserts(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        return self.conv(x)  # type: ignore[no-any-return]


class Loops(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[i : i + 1]) for i in range(x.shape[0])])


class Converts(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / int(x.shape[1])  # type: ignore[no-any-return]


class Lengths(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / len(x)  # type: ignore[no-any-return]


class Factory(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.zeros(x.shape[0], 1, 1, 1)  # type: ignore[no-any-return]


class Assigns(Block):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(x)
        z[:, 0] = 0.0
        return z


class Depth(Block):
    """Stochastic depth in the block's own forward, so rare that few passes show it."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.rand(()) < 1e-6:
            return x
        return x + self.conv(x)  # type: ignore[no-any-return]


class PythonDepth(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 1e-6 else x + self.conv(x)


class Noise(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.randn(8, 1, 1)  # type: ignore[no-any-return]


class OwnDepth(Block):
    """Draws from a generator of its own, which is not to be seen from outside."""

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2)
        return x if torch.rand((), generator=generator) < 0.6 else self.conv(x)


class ByMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # the convolution takes the other value, but it is not to blame
            x = x * 1.0
        return self.conv(x)  # type: ignore[no-any-return]


class FunctionalNorm(Block):
    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(self.conv(x), self.mean, self.var, training=self.training)


class AlwaysDrops(Block):
    """A dropout that was never told the mode."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.conv(x), 0.5)


class Aliases(Block):
    """The sum changes what the other name holds, too."""

    def forward(self, x: Tensor) -> Tensor:
        z = kept = self.conv(x)
        z += x
        return z + kept  # type: ignore[no-any-return]


class Views(Block):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(x)
        z.flatten(1).mul_(2.0)
        return z


class Fills(Block):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(x)
        return z.copy_(x)


class Out(Block):
    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(x).detach()
        torch.add(z, 1.0, out=z)
        return x + z


class Pool(nn.Module):
    """Remembers the size of its last input."""

    size = 0

    def forward(self, x: Tensor) -> Tensor:
        self.size = x.shape[-1]
        return x


class Remembers(Block):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x)) * self.pool.size  # type: ignore[no-any-return]


class Crops(Remembers):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))[..., : self.pool.size]  # type: ignore[no-any-return]


CONTROL = "cannot be traced: symbolically traced variables cannot be used as inputs to control flow"
PROXY = "cannot be traced: .*Proxy.*"
RANDOM = "draws random numbers, which a trace would freeze"
MODES = "does something else in training than in evaluation mode"
OTHER = "computes something else than its trace"
WRITES = "writes into a tensor that it reads"
REFUSED: dict[type[Block], str] = {
    ByValue: CONTROL,
    ByParity: CONTROL,
    Asserts: CONTROL,
    Loops: PROXY,
    Converts: PROXY,
    Lengths: "cannot be traced: 'len' is not supported in symbolic tracing.*",
    Factory: r"cannot be traced: zeros\(\) takes .*",
    Assigns: PROXY,
    Depth: RANDOM,
    PythonDepth: RANDOM,
    Noise: RANDOM,
    OwnDepth: f"{OTHER} in training mode, on 2x3x12x9 numbers",
    ByMode: MODES,
    FunctionalNorm: MODES,
    AlwaysDrops: f"{OTHER} in evaluation mode, on 2x3x12x9 numbers",
    Aliases: f"{OTHER} in training mode, on 2x3x12x9 numbers",
    Views: f"{OTHER} in training mode, on 2x3x12x9 numbers",
    Fills: WRITES,
    Out: WRITES,
    Remembers: f"{OTHER} in training mode, on 2x3x44x41 numbers",
    Crops: f"{OTHER} in training mode, on 2x3x44x41 numbers",
}
