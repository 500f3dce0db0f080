"""Layers that are used in unusual ways, with the number of parameters that can be products."""

from collections.abc import Callable
from typing import Any

import torch
from models import data
from torch import Tensor, nn
from zoo import ROWS, SERIES, WORDS, Three

L = nn.Linear
MORE = data(3, 4, 6, seed=4)


def three(trunk: Callable[[], nn.Module], x: Tensor, width: int, run: Any = None) -> Three:
    return Three(trunk(), x, width, run)


class Tied(nn.Module):
    """A table that is the output layer, too."""

    def __init__(self, same_kind: bool) -> None:
        super().__init__()
        self.table, self.same_kind = nn.Embedding(9, 4), same_kind

    def forward(self, words: Tensor) -> Tensor:
        z = self.table(words).sum(dim=1).tanh()
        if self.same_kind:
            return z + self.table(words.flip(0)).mean(dim=1)
        return z @ self.table.weight.T


def lora(layers: nn.ModuleList, x: Tensor) -> Tensor:
    frozen, down, up = layers
    frozen.requires_grad_(False)
    return frozen(x) + up(down(x))


class Experts(nn.Module):
    """One weight for each member of a batch of matrices, used in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(2, 6, 6)), nn.Parameter(torch.zeros(2, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.baddbmm(self.b, x.expand(2, -1, -1), self.w) @ self.w).sum(dim=0)


def unrolled(cell: nn.Module, x: Tensor) -> Tensor:
    z = x[:, 0]
    for t in range(x.shape[1]):
        z = cell(z + x[:, t]).tanh()
    return z


def offloaded(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return layer(layer(x).tanh())


def hooked(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Hooks where the pass goes on and where it ends, which torch treats differently."""
    first, second, third = layers
    y = first(x)
    y.register_hook(lambda grad: grad * 2)
    z = second(y.tanh())
    z.register_hook(lambda grad: grad * 3)
    return third(z.tanh()).tanh()


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(dim=1)


ODD: dict[str, tuple[Callable[[], Three], int]] = {
    "table and output layer": (lambda: three(lambda: Tied(False), WORDS, 9), 0),
    "table used twice": (lambda: three(lambda: Tied(True), WORDS, 4), 1),
    "padding": (lambda: three(lambda: nn.Sequential(nn.Embedding(9, 4, 1), Sum()), WORDS, 4), 1),
    "low rank": (
        lambda: three(lambda: nn.ModuleList([L(6, 4), L(6, 1), L(1, 4)]), ROWS, 4, lora),
        2,
    ),
    "experts": (lambda: three(Experts, ROWS, 6), 1),
    "unrolled": (lambda: three(lambda: L(6, 6), MORE, 6, unrolled), 1),
    "no bias, three axes": (
        lambda: three(lambda: L(6, 4, bias=False), MORE, 4, lambda layer, x: layer(x).mean(dim=1)),
        1,
    ),
    "not contiguous": (
        lambda: three(lambda: L(3, 4), MORE.mT[:, :, :3], 4, lambda layer, x: layer(x).mean(dim=1)),
        1,
    ),
    "one axis": (lambda: three(lambda: L(6, 4), ROWS[0], 4, lambda layer, x: layer(x)[None]), 1),
    "offloaded": (lambda: three(lambda: L(6, 6), ROWS, 6, offloaded), 0),
    "hooks at outputs": (
        lambda: three(lambda: nn.ModuleList(L(6, 6) for _ in range(3)), ROWS, 6, hooked),
        3,
    ),
    "hooks at outputs, no bias": (
        lambda: three(
            lambda: nn.ModuleList(L(6, 6, bias=False) for _ in range(3)), ROWS, 6, hooked
        ),
        3,
    ),
    "encoder": (
        lambda: three(
            lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True),
            SERIES.mT,
            4,
            lambda trunk, x: trunk(x).mT,
        ),
        4,
    ),
    "attention across": (
        lambda: three(
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            SERIES.mT,
            4,
            lambda trunk, x: trunk(x, x * 2, x.sin())[0].mT,
        ),
        1,  # the weight of all three inputs is split
    ),
}
