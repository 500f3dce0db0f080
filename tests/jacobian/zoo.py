"""Modules that are hard to differentiate in batches, each as the trunk of three tasks.

Every entry builds a model with a method ``losses()``, in float64, with fixed inputs and the same
random numbers in every forward pass.
"""

from collections.abc import Callable

import torch
from models import data, fill, square
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Forward = Callable[[nn.Module, Tensor], Tensor]


class Three(nn.Module):
    """A trunk, a fixed input, and three heads of one linear layer each."""

    def __init__(self, trunk: nn.Module, x: Tensor, width: int, forward: Forward | None = None):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(width, 2) for _ in range(3))
        self.x, self.run = x, forward or (lambda trunk, x: trunk(x))
        fill(self, 3)

    def losses(self) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            z = self.run(self.trunk, self.x)
        z = z.flatten(2).mean(dim=2) if z.ndim > 2 else z
        return [square(head(z) - k) for k, head in enumerate(self.heads)]


ZOO: dict[str, Callable[[], Three]] = {}
FALLS_BACK: set[str] = set()
IMAGE = data(3, 4, 8, 8, seed=1)
ROWS = data(5, 6, seed=2)
WORDS = torch.tensor([[0, 3, 3, 1], [8, 1, 0, 2], [4, 4, 4, 5]])
SERIES = data(3, 4, 6, seed=4)


def entry(
    name: str, trunk: Callable[[], nn.Module], x: Tensor, width: int, forward: Forward | None = None
) -> None:
    def build() -> Three:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # spectral norms start from a random vector
            return Three(trunk(), x, width, forward)

    ZOO[name] = build


def conv(**options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 3, **options), nn.ReLU(), nn.Conv2d(4, 4, 3))


def after_linear(module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 6), module())


entry("linear", lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)), ROWS, 4)
entry("conv", conv(padding=1), IMAGE, 4)
entry("conv, stride 2", conv(stride=2), IMAGE, 4)
entry("conv, dilated, no bias", conv(dilation=2, bias=False), IMAGE, 4)
entry("conv, depthwise", conv(groups=4, padding="same"), IMAGE, 4)
entry("conv, circular", conv(padding=1, padding_mode="circular"), IMAGE, 4)
entry("conv, one dimension", lambda: nn.Conv1d(4, 3, 3), IMAGE[..., 0], 3)
entry("transposed conv", lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), IMAGE, 3)
entry(
    "conv, channels last",
    lambda: conv(padding=1)().to(memory_format=torch.channels_last),
    IMAGE.contiguous(memory_format=torch.channels_last),
    4,
)
entry("max pool", lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(2)), IMAGE, 4)
entry("adaptive pool", lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(2)), IMAGE, 4)
entry("upsample", lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.Upsample(scale_factor=2)), IMAGE, 3)
entry("batch norm", lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), IMAGE, 4)
entry(
    "batch norm, evaluating",
    lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).eval(),
    IMAGE,
    4,
)
entry("layer norm", after_linear(lambda: nn.LayerNorm(6)), ROWS, 6)
entry("rms norm", after_linear(lambda: nn.RMSNorm(6)), ROWS, 6)
entry("group norm", lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4)), IMAGE, 4)
entry("softmax", after_linear(lambda: nn.Softmax(dim=1)), ROWS, 6)
entry("mish", after_linear(nn.Mish), ROWS, 6)
entry("dropout", lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4)), ROWS, 4)
entry(
    "attention",
    lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    SERIES.mT,
    4,
    lambda trunk, x: trunk(x, x, x)[0].mT,
)
entry(
    "scaled dot product attention",
    lambda: nn.Linear(4, 12),
    SERIES.mT,
    4,
    lambda trunk, x: F.scaled_dot_product_attention(*trunk(x).chunk(3, dim=-1)).mT,
)
entry(
    "transformer layer",
    lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True),
    SERIES.mT,
    4,
    lambda trunk, x: trunk(x).mT,
)
entry("lstm", lambda: nn.LSTM(6, 4), data(3, 5, 6), 4, lambda trunk, x: trunk(x)[0][-1])
entry("gru", lambda: nn.GRU(6, 4, num_layers=2), data(3, 5, 6), 4, lambda t, x: t(x)[0][-1])
entry(
    "rnn, two ways",
    lambda: nn.RNN(6, 2, bidirectional=True),
    data(3, 5, 6),
    4,
    lambda trunk, x: trunk(x)[0][-1],
)
entry("embedding", lambda: nn.Embedding(9, 4), WORDS, 4, lambda trunk, x: trunk(x).sum(dim=1))
entry(
    "embedding with padding",
    lambda: nn.Embedding(9, 4, padding_idx=0, scale_grad_by_freq=True),
    WORDS,
    4,
    lambda trunk, x: trunk(x).sum(dim=1),
)
entry("embedding bag", lambda: nn.EmbeddingBag(9, 4, mode="mean"), WORDS, 4)
entry(
    "sparse embedding",
    lambda: nn.Embedding(9, 4, sparse=True),
    WORDS,
    4,
    lambda trunk, x: trunk(x).sum(dim=1),
)
entry(
    "sparse embedding under a dense layer",
    lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4)),
    WORDS,
    4,
    lambda trunk, x: trunk(x).sum(dim=1),
)
entry(
    "tied weights",
    lambda: nn.Linear(6, 6),
    ROWS,
    6,
    lambda trunk, x: trunk(trunk(x).tanh()) @ trunk.weight,
)
entry(
    "a layer used three times",
    lambda: nn.Linear(6, 6),
    ROWS,
    6,
    lambda trunk, x: trunk(trunk(trunk(x).tanh()).sin()),
)
entry(
    "checkpoint",
    lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)),
    ROWS,
    4,
    lambda trunk, x: checkpoint(trunk, x, use_reentrant=False),
)
entry(
    "checkpoint with dropout",
    lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 4)),
    ROWS,
    4,
    lambda trunk, x: checkpoint(trunk, x, use_reentrant=False),
)


def in_place(trunk: nn.Module, x: Tensor) -> Tensor:
    z = trunk(x)
    z += 1
    z[:, 1] = z[:, 0] * 2
    z.mul_(torch.arange(6).double())
    return z.relu_()


def indexed(trunk: nn.Module, x: Tensor) -> Tensor:
    z = trunk(x)
    z = torch.zeros(7, 6).double().index_add(0, torch.tensor([0, 6, 6, 2, 1]), z)
    z = torch.where(z > 0, z, z * 0.1).index_put((torch.tensor([0, 0]),), z[:2], accumulate=True)
    picked = z[z.detach().sum(dim=1) > 0]
    return (
        z.gather(1, z.argsort(dim=1))
        + picked.sum(dim=0)
        + z.scatter_reduce(0, torch.zeros(7, 6).long(), z, "amax").sum(dim=0)
    )


entry("in-place operations", lambda: nn.Linear(6, 6), ROWS, 6, in_place)
entry("index operations", lambda: nn.Linear(6, 6), ROWS, 6, indexed)
entry(
    "fft",
    lambda: nn.Linear(6, 6),
    ROWS,
    4,
    lambda trunk, x: torch.fft.rfft(trunk(x)).abs().square(),
)
entry(
    "weight norm",
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 4).double()),
    ROWS,
    4,
)
entry(
    "spectral norm",
    lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 4).double()).eval(),
    ROWS,
    4,
)
entry(
    "solving",
    lambda: nn.Linear(6, 6),
    ROWS,
    6,
    lambda trunk, x: (
        torch.linalg.solve(trunk.weight @ trunk.weight.T + torch.eye(6), x.T).T + trunk.bias
    ),
)


class Leaves(torch.autograd.Function):
    """An exponential whose backward pass leaves torch, so that it cannot be batched."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(y := x.exp())
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # type: ignore[attr-defined]  # of the backward context
        return torch.from_numpy(grad.numpy() * y.numpy())


entry("function in numpy", lambda: nn.Linear(6, 4), ROWS, 4, lambda t, x: Leaves.apply(t(x)))
FALLS_BACK |= {
    "sparse embedding",
    "sparse embedding under a dense layer",
    "function in numpy",
    "checkpoint with dropout",
}
