"""The network for two-digit pictures: an encoder of three stages, and a head for each task."""

from torch import nn

HEIGHT, WIDTH = 12, 24  # of a picture
CHANNELS, FEATURES, HIDDEN = 16, 64, 32


def _convolution(inputs: int, outputs: int, width: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, width, stride=2, padding=width // 2)
    return nn.Sequential(layer, nn.ReLU())


def _features() -> nn.Module:
    inputs = 2 * CHANNELS * (HEIGHT // 4) * (WIDTH // 4)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, FEATURES), nn.ReLU())


def heads() -> dict[str, nn.Module]:
    """Return new heads, by task."""
    return {"left": _head(10), "right": _head(10), "distance": _head(1)}


def _head(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


STAGES = (
    lambda: _convolution(1, CHANNELS, 5),
    lambda: _convolution(CHANNELS, 2 * CHANNELS, 3),
    _features,
)
