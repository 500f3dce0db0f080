"""Drawn scenes, of which every pixel has a class and a depth; nothing is read from files.

A floor rises to the horizon. On it stand discs, squares and triangles, at most four; nearer ones
hide what is behind them. All shapes of a depth have one size, and fog takes the contrast of what is
far, so that depth can be seen; colours are random and say nothing. A second of drawing makes
thousands.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Generator, Tensor, nn

from gradbal.lab.problems.losses import absolute_error, cross_entropy
from gradbal.lab.problems.metrics import Depth, Segmentation
from gradbal.lab.problems.problem import Examples, Problem, Task

SIDE = 24  # pixels
SHAPES = 3  # disc, square, triangle; class 0 is what they stand on
OBJECTS = 4  # at most, each there with a chance of three in four
NEAR, FAR = 1.0, 4.0
FOG = 0.6  # share of a colour that is grey at the largest depth
NOISE = 0.06  # standard deviation of what is added to every pixel
COUNTS = (1200, 300, 600)  # scenes for training, validation and test
WIDTHS = (8, 16, 24)  # channels of a map of full, half and quarter size


def load(seed: int, counts: tuple[int, int, int] = COUNTS, width: float = 1.0) -> Problem:
    """Draw the scenes; the same seed draws the same ones.

    Args:
        seed: Of the scenes.
        counts: Scenes for training, validation and test.
        width: Factor of the channels of the network.
    """
    widths = tuple(round(width * channels) for channels in WIDTHS)
    generator = Generator().manual_seed(seed)
    train, validation, test = (scenes(count, generator) for count in counts)
    return Problem(
        name="scenes",
        tasks={
            "segmentation": Task(cross_entropy, partial(Segmentation, SHAPES + 1), "miou"),
            "depth": Task(absolute_error, Depth, "abs_err"),
        },
        train=train,
        validation=validation,
        test=test,
        stages=stages(widths),
        heads={
            "segmentation": partial(_head, widths[0], SHAPES + 1, 0.0),
            "depth": partial(_head, widths[0], 1, (NEAR + FAR) / 2),
        },
        batch=16,
    )


def scenes(n: int, generator: Generator) -> Examples:
    """Draw scenes.

    Args:
        n: How many.
        generator: Source of randomness.

    Returns:
        Pictures, shape ``[n, 3, 24, 24]``, with the classes and the depths of their pixels.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, 1, 1, generator=generator)

    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    horizon = uniform(-0.9, -0.4)
    depth = (FAR - (FAR - NEAR) * (y - horizon) / (1 - horizon)).clamp(max=FAR)
    classes = torch.zeros(n, SIDE, SIDE, dtype=torch.int64)
    colour = uniform(0, 1, 3).expand(n, 3, SIDE, SIDE)
    depths = uniform(NEAR, FAR, OBJECTS).sort(dim=1, descending=True).values
    for z in depths.unbind(1):  # the farthest first
        size, shape = 0.9 / z, torch.randint(SHAPES, (n, 1, 1), generator=generator)
        across, below = (x - uniform(-0.8, 0.8)) / size, (y - uniform(-0.6, 0.8)) / size
        disc, square = across.square() + below.square() < 1, across.abs().maximum(below.abs()) < 0.9
        triangle = (below.abs() < 1) & (2 * across.abs() < 1 + below)
        inside = torch.stack([disc, square, triangle]).gather(0, shape.expand_as(disc)[None])[0]
        inside &= uniform(0, 1) < 0.75
        depth, classes = z.where(inside, depth), (shape + 1).where(inside, classes)
        colour = uniform(0, 1, 3).where(inside[:, None], colour)
    fog = FOG * ((depth - NEAR) / (FAR - NEAR))[:, None]
    images = (1 - fog) * colour + 0.5 * fog
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    return Examples(images, {"segmentation": classes, "depth": depth})


def stages(widths: Sequence[int] = WIDTHS) -> tuple[partial[nn.Module], ...]:
    """Return makers of the parts of a network, two down and two up, with a map of full size.

    Args:
        widths: Channels of a map of full, half and quarter size.
    """
    full, half, quarter = widths
    return (
        partial(_stage, (3, full), 1),
        partial(_stage, (full, half, half), 2),
        partial(_stage, (half, quarter, quarter), 2),
        partial(_stage, (quarter, half), 0.5),
        partial(_stage, (half, full), 0.5),
    )


def _stage(channels: tuple[int, ...], scale: float) -> nn.Module:
    """Return convolutions, of which the first makes the map smaller by a factor, or larger."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2)] if scale < 1 else []
    for i, (inputs, outputs) in enumerate(pairwise(channels)):
        stride = 1 if i else max(1, int(scale))
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _head(full: int, outputs: int, start: float) -> nn.Module:
    """Return a head whose outputs start around a value: far from it, its units would die."""
    last = nn.Conv2d(full, outputs, 1)
    nn.init.constant_(last.bias, start)  # type: ignore[arg-type]  # it has one
    return nn.Sequential(nn.Conv2d(full, full, 3, 1, 1), nn.ReLU(), last)
