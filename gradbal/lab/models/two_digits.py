"""The network for two-digit pictures: an encoder of three stages, and a head for each task."""

from torch import nn

from gradbal.lab.models.encoders import mlp_head

HEIGHT, WIDTH = 12, 24  # of a picture
CHANNELS, FEATURES, HIDDEN = 16, 64, 32


def _convolution(inputs: int, outputs: int, width: int) -> nn.Module:
    layer = nn.Conv2d(inputs, outputs, width, stride=2, padding=width // 2)
    return nn.Sequential(layer, nn.ReLU())


def _features() -> nn.Module:
    inputs = 2 * CHANNELS * (HEIGHT // 4) * (WIDTH // 4)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, FEATURES), nn.ReLU())


STAGES = (
    lambda: _convolution(1, CHANNELS, 5),
    lambda: _convolution(CHANNELS, 2 * CHANNELS, 3),
    _features,
)
OUTPUTS = {"left": 10, "right": 10, "distance": 1}
HEADS = {task: mlp_head(FEATURES, HIDDEN, n) for task, n in OUTPUTS.items()}


def heads() -> dict[str, nn.Module]:
    """Return new heads, by task."""
    return {task: make() for task, make in HEADS.items()}
