"""Models with one trunk and a head per task, on one fixed batch, at sizes for a core or a card."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

OUTPUTS = 10  # of each head


class Size(NamedTuple):
    """How large a model is.

    Args:
        batch: Examples.
        width: Of layers, channels or embeddings.
        depth: How many layers are stacked.
        length: Inputs, pixels on a side, tokens, or rows of a table.
    """

    batch: int
    width: int
    depth: int
    length: int


class SharedTrunk(nn.Module):
    """A trunk, linear heads, inputs and targets.

    Args:
        trunk: Shared by all tasks.
        features: Numbers that it returns for each example.
        n_tasks: Number of heads.
        inputs: A batch.
        dtype: What autocast computes in; parameters are float32.
    """

    def __init__(
        self,
        trunk: nn.Module,
        features: int,
        n_tasks: int,
        inputs: Tensor,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.trunk = trunk
        self.inputs: Tensor
        self.heads = nn.ModuleList(nn.Linear(features, OUTPUTS) for _ in range(n_tasks))
        self.register_buffer("inputs", inputs)
        self.targets: Tensor
        self.register_buffer("targets", torch.randn(n_tasks, len(inputs), OUTPUTS))

    def features(self) -> Tensor:
        with self.precision():
            found: Tensor = self.trunk(self.inputs)
        return found

    def losses_of(self, features: Tensor) -> list[Tensor]:
        pairs = zip(self.heads, self.targets.unbind(), strict=True)
        with self.precision():
            return [functional.mse_loss(head(features), target) for head, target in pairs]

    def losses(self) -> list[Tensor]:
        return self.losses_of(self.features())

    def forward(self) -> list[Tensor]:
        return self.losses()

    def precision(self) -> torch.autocast:
        wanted = self.dtype != torch.float32
        return torch.autocast(self.inputs.device.type, self.dtype if wanted else None, wanted)


def mlp(size: Size) -> tuple[nn.Module, Tensor]:
    widths = [size.length, *[size.width] * size.depth]
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(size.batch, size.length)


def cnn(size: Size) -> tuple[nn.Module, Tensor]:
    """Halve the picture and double the channels up to twice, as many layers as are asked for."""
    layers: list[nn.Module] = []
    channels = 3
    for level in range(size.depth):
        wide = size.width * min(2**level, 4)
        stride = 2 if level in (1, 2) else 1
        layers += [nn.Conv2d(channels, wide, 3, stride, padding=1), nn.ReLU()]
        channels = wide
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers), torch.randn(size.batch, 3, size.length, size.length)


class Transformer(nn.Module):
    """Blocks of attention over embedded tokens, averaged at the end."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embed = nn.Linear(32, size.width)
        block = nn.TransformerEncoderLayer(
            size.width, 4, 4 * size.width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, size.depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.blocks(self.embed(tokens)).mean(dim=1)
        return out


def transformer(size: Size) -> tuple[nn.Module, Tensor]:
    return Transformer(size), torch.randn(size.batch, size.length, 32)


def recommender(size: Size) -> tuple[nn.Module, Tensor]:
    """One table for ten fields, and a small network on top: nearly all parameters are its rows."""
    fields, hidden = 10, 128
    layers: list[nn.Module] = [nn.Embedding(size.length, size.width), nn.Flatten()]
    width = fields * size.width
    for _ in range(size.depth):
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*layers), torch.randint(size.length, (size.batch, fields))


MODELS: dict[str, Callable[[Size], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "recommender": recommender,
}
# a plain step takes 5 to 60 ms on one core
ON_CORE = {
    "mlp": Size(batch=128, width=1024, depth=3, length=256),
    "cnn": Size(batch=16, width=32, depth=3, length=32),
    "transformer": Size(batch=16, width=128, depth=2, length=32),
    "recommender": Size(batch=512, width=16, depth=2, length=100_000),
}
ON_CARD = {
    "mlp": Size(batch=4096, width=4096, depth=3, length=1024),
    "cnn": Size(batch=128, width=128, depth=6, length=64),
    "transformer": Size(batch=32, width=1024, depth=8, length=256),
    "recommender": Size(batch=16384, width=64, depth=3, length=1_000_000),
}


def size_of(name: str, device: torch.device) -> Size:
    """Return the usual size of a model on a device."""
    return (ON_CORE if device.type == "cpu" else ON_CARD)[name]


def make_model(
    name: str, n_tasks: int, size: Size, device: torch.device, dtype: torch.dtype
) -> SharedTrunk:
    """Return a model with seeded weights and data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk, inputs = MODELS[name](size)
        with torch.no_grad():
            features = trunk(inputs[:1]).shape[-1]
        model = SharedTrunk(trunk, features, n_tasks, inputs, dtype)
    return model.to(device)
