"""Two-digit pictures, made from the handwritten digits that scikit-learn brings along."""

import torch
from torch import Tensor

from gradbal.lab.models.two_digits import HEIGHT, WIDTH
from gradbal.lab.problems.problem import Examples

SIDE = 8  # of a digit, in pixels; it lies somewhere in its half of a picture
SHARES = (0.6, 0.2, 0.2)  # of the digits, for training, validation and test
NOISE = 0.15  # standard deviation of what is added to every pixel
COPIES = (40, 10, 20)  # pictures of each of the 100 pairs of digits, for the same three


def two_digits(
    seed: int, copies: tuple[int, int, int] = COPIES
) -> tuple[Examples, Examples, Examples]:
    """Build the pictures; the same seed gives the same ones.

    The digits are split first, so no digit of a test picture is seen in training. Every pair of
    digits is equally frequent in each split.

    Args:
        seed: Seed of the split, of which digits meet, and of where they lie.
        copies: Pictures of each pair of digits for training, validation and test.

    Returns:
        Pictures for training, validation and test, see :func:`compose`.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    digits = torch.tensor(loaded.images / 16, dtype=torch.float32)
    labels = torch.tensor(loaded.target)
    generator = torch.Generator().manual_seed(seed)
    parts = split(labels, generator)
    train, validation, test = (
        compose(digits[part], labels[part], count, generator)
        for part, count in zip(parts, copies, strict=True)
    )
    return train, validation, test


def split(labels: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Share the digits out, class by class, in the proportions ``SHARES``.

    Returns:
        Three tensors of positions; every position is in one of them.
    """
    parts: list[list[Tensor]] = [[] for _ in SHARES]
    for digit in range(10):
        positions = (labels == digit).nonzero().flatten()
        shuffled = positions[torch.randperm(len(positions), generator=generator)]
        first = round(SHARES[0] * len(positions))
        second = first + round(SHARES[1] * len(positions))
        pieces = shuffled.tensor_split((first, second))
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [torch.cat(part) for part in parts]


def compose(digits: Tensor, labels: Tensor, copies: int, generator: torch.Generator) -> Examples:
    """Put digits side by side, each at a random place in its half, and add noise.

    Args:
        digits: Shape ``[k, 8, 8]``.
        labels: Shape ``[k]``; every class occurs.
        copies: Pictures of each of the 100 pairs.
        generator: Source of randomness.

    Returns:
        Images, shape ``[n, 1, 12, 24]``, ink in [0, 1] plus noise, with the left and the right
        digit, and the distance between the centres of ink of both in pixels, shape ``[n]`` each.
    """
    pairs = torch.arange(100).repeat(copies)
    left, right = pairs // 10, pairs % 10
    images = torch.zeros(len(pairs), HEIGHT, WIDTH)
    centres = [
        _place(images, digits[_draw(labels, wanted, generator)], start, generator)
        for wanted, start in ((left, 0), (right, WIDTH // 2))
    ]
    distance = (centres[0] - centres[1]).norm(dim=1)
    images += NOISE * torch.randn(images.shape, generator=generator)
    return Examples(images[:, None], {"left": left, "right": right, "distance": distance})


def _draw(labels: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """Return for each wanted class the position of one digit of that class."""
    order = labels.argsort(stable=True)
    counts = labels.bincount(minlength=10)
    starts = counts.cumsum(0) - counts
    chance = torch.rand(len(wanted), generator=generator, dtype=torch.float64)
    return order[starts[wanted] + (chance * counts[wanted]).long()]


def _place(images: Tensor, digits: Tensor, start: int, generator: torch.Generator) -> Tensor:
    """Write one digit into each image and return its centre of ink, shape ``[n, 2]``."""
    n, inside = len(images), torch.arange(SIDE)
    top = torch.randint(HEIGHT - SIDE + 1, (n,), generator=generator)
    edge = start + torch.randint(WIDTH // 2 - SIDE + 1, (n,), generator=generator)
    rows, columns = top[:, None] + inside, edge[:, None] + inside
    images[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]] = digits
    ink = digits.sum(dim=(1, 2))
    heights = (digits.sum(dim=2) * rows).sum(dim=1) / ink
    widths = (digits.sum(dim=1) * columns).sum(dim=1) / ink
    return torch.stack([heights, widths], dim=1)
