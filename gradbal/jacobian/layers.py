"""Layers whose weight gradient is a product of what they have saved and what a task brings."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gradbal.graph.walk import Boundary

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Sketch:
    """A random projection that keeps inner products on average.

    Attributes:
        size: Number of dimensions that are left.
        seed: Of the draw.
    """

    size: int
    seed: int

    def matrix(self, n_inputs: int, like: Tensor) -> Tensor:
        r"""Return S, shape ``[n_inputs, size]``, with :math:`E[S S^\top] = I`: signs, scaled."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        shape = n_inputs, self.size
        signs = torch.randint(2, shape, generator=generator, device=like.device) * 2 - 1
        return torch.mul(signs.to(like), self.size**-0.5)


class Sizes(NamedTuple):
    """Of the task's factor, ``[members, rows, a]``, and the saved one, ``[members, rows, b]``."""

    members: int
    rows: int
    a: int
    b: int

    @property
    def brought(self) -> int:
        """Number of entries of a task's factor."""
        return self.members * self.rows * self.a


class Use(ABC):
    r"""One use of a parameter: its gradient is :math:`G^\top X`, where only G is the task's.

    Attributes:
        saved: What X is made from.
        sizes: Of G and X.
        kind: What must be equal for uses to go together, beside class and all sizes but ``rows``.
    """

    saved: Tensor
    sizes: Sizes
    kind: object = None

    @abstractmethod
    def factor(self, cotangent: Tensor) -> Tensor:
        """Return G, from the gradient with respect to the output."""

    @abstractmethod
    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return the gradient of the parameter."""

    def goes_with(self, other: "Use") -> bool:
        """Say whether gradients of the two are products of the same form."""
        mine, theirs = self.sizes._replace(rows=0), other.sizes._replace(rows=0)
        return (type(self), self.kind, mine) == (type(other), other.kind, theirs)


class Outer(Use):
    """A use with any matrix for X."""

    @abstractmethod
    def inputs(self) -> Tensor:
        """Return X."""

    def projected(self, matrix: Tensor) -> Tensor:
        """Return X times a matrix with ``b`` rows."""
        inputs = self.inputs()
        return inputs @ matrix.to(inputs)

    @abstractmethod
    def weight(self, product: Tensor) -> Tensor:
        """Bring a product, shape ``[members, a, b]``, into the shape of the parameter."""

    def gradient(self, cotangent: Tensor) -> Tensor:
        inputs = self.inputs()
        return self.weight(self.factor(cotangent).mT.to(inputs.dtype) @ inputs)


class Matmul(Outer):
    """A weight in a product of matrices, or of batches of matrices.

    Args:
        other: The other operand.
        first: Whether the weight is the first operand.
        order: Which axis of ``[a, b]``, in a batch of ``[members, a, b]``, each axis of the
            parameter is.
        shape: Of the parameter.
    """

    def __init__(
        self, other: Tensor, first: bool, order: tuple[int, ...], shape: torch.Size
    ) -> None:
        self.saved, self.first, self.kind, self.order = other, first, order, order
        members, rows, b = self.inputs().shape
        self.sizes = Sizes(members, rows, shape.numel() // max(1, members * b), b)

    def inputs(self) -> Tensor:
        return self.factor(self.saved)

    def factor(self, cotangent: Tensor) -> Tensor:
        matrix = cotangent.mT if self.first else cotangent
        return matrix if matrix.ndim == 3 else matrix[None]

    def weight(self, product: Tensor) -> Tensor:
        return (product if len(self.order) == 3 else product[0]).permute(self.order)


class Convolution(Outer):
    """A weight in a convolution: a product with the windows of the input.

    A transposed convolution goes from the places of windows to the image that they look at, so
    there it is the task that brings windows.

    Args:
        image: The input.
        shape: Of the parameter.
        stride: Steps between windows, per axis of space.
        padding: Zeros on either side of what the windows look at.
        dilation: Steps within windows.
        groups: Number of groups of channels.
        transposed: Whether the convolution is transposed.
    """

    def __init__(
        self,
        image: Tensor,
        shape: torch.Size,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        transposed: bool,
    ) -> None:
        self.saved, self.shape, self.groups, self.transposed = image, shape, groups, transposed
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.places = list(image.shape[2:])
        if not transposed:
            space = zip(image.shape[2:], shape[2:], stride, padding, dilation, strict=True)
            self.places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in space]
        here, windows = shape[0] // groups, shape[1:].numel()
        a, b = (windows, here) if transposed else (here, windows)
        self.sizes = Sizes(groups, len(image) * math.prod(self.places), a, b)
        self.kind = transposed

    def inputs(self) -> Tensor:
        return (self._values if self.transposed else self._windows)(self.saved)

    def factor(self, cotangent: Tensor) -> Tensor:
        return (self._windows if self.transposed else self._values)(cotangent)

    def weight(self, product: Tensor) -> Tensor:
        return (product.mT if self.transposed else product).reshape(self.shape)

    def gradient(self, cotangent: Tensor) -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(
            cotangent,
            self.saved.to(cotangent.dtype),
            cotangent.new_empty(self.shape),
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self._added(cotangent),
            self.groups,
            (False, True, False),
        )[1]
        return gradient

    def _added(self, cotangent: Tensor) -> list[int]:
        """Return how much larger the output is than a transposed convolution makes it."""
        if not self.transposed:
            return [0] * len(self.places)
        sizes = self.saved.shape[2:], cotangent.shape[2:], self.shape[2:]
        options = self.stride, self.padding, self.dilation
        space = zip(*sizes, *options, strict=True)
        return [o - (i - 1) * s + 2 * p - d * (k - 1) - 1 for i, o, k, s, p, d in space]

    def projected(self, matrix: Tensor) -> Tensor:
        if self.transposed:
            return super().projected(matrix)
        kernels = (
            matrix.T.to(self.saved)
            .reshape(-1, *self.shape[1:])
            .repeat(self.groups, *[1] * (self.saved.ndim - 1))
        )
        image = F.pad(self.saved, self._margins())
        conv = CONVOLUTIONS[len(self.places)]
        return self._values(
            conv(image, kernels, stride=self.stride, dilation=self.dilation, groups=self.groups)
        )

    def _values(self, image: Tensor) -> Tensor:
        """Lay out what has one value per window, ``[groups, rows, channels]``."""
        grouped = image.reshape(len(image), self.groups, -1, math.prod(self.places))
        return grouped.permute(1, 0, 3, 2).flatten(1, 2)

    def _windows(self, image: Tensor) -> Tensor:
        """Lay out the windows of an image, ``[groups, rows, channels * places in a window]``."""
        image = F.pad(image, self._margins())
        n_samples, n_channels = image.shape[:2]
        sample, channel, *steps = image.stride()
        group = n_channels // self.groups
        size = (n_samples, self.groups, group, *self.places, *self.shape[2:])
        between = [step * s for step, s in zip(steps, self.stride, strict=True)]
        within = [step * d for step, d in zip(steps, self.dilation, strict=True)]
        windows = image.as_strided(size, (sample, group * channel, channel, *between, *within))
        dims = len(self.places)
        order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
        return windows.permute(order).flatten(2 + dims).flatten(1, 1 + dims)

    def _margins(self) -> list[int]:
        return [p for p in reversed(self.padding) for _ in range(2)]


class Lookup(Use):
    """A table of which rows are looked up: each row of X has a single one.

    Args:
        indices: The rows looked up.
        padding: Index that gets no gradient, or a negative number.
        shape: Of the table.
    """

    def __init__(self, indices: Tensor, padding: int, shape: torch.Size) -> None:
        self.saved, self.shape = indices.flatten(), shape
        self.padded = (self.saved == padding)[:, None] if padding >= 0 else None
        self.sizes = Sizes(1, len(self.saved), shape[1], shape[0])

    def factor(self, cotangent: Tensor) -> Tensor:
        flat = cotangent.reshape(1, -1, self.shape[1])
        return flat if self.padded is None else flat.masked_fill(self.padded, 0)

    def gradient(self, cotangent: Tensor) -> Tensor:
        table = cotangent.new_zeros(self.shape)
        return table.index_add_(0, self.saved, self.factor(cotangent)[0])


@dataclass(frozen=True, eq=False)
class Layer:
    """A parameter with all its uses in a piece of the graph.

    Attributes:
        param: The parameter.
        edges: The outputs of its uses.
        uses: Its uses, which go together.
        sketch: A random projection of X for inner products; None for exact ones.
    """

    param: Tensor
    edges: Boundary
    uses: Sequence[Use]
    sketch: Sketch | None = None

    def gradient(self, cotangents: Sequence[Tensor | None]) -> Tensor:
        """Form the gradient for cotangents at the outputs, of which one at least is there."""
        parts = [
            use.gradient(cotangent).to(self.param)
            for use, cotangent in zip(self.uses, cotangents, strict=True)
            if cotangent is not None
        ]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
