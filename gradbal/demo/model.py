"""A small trunk with three heads, its losses and its scores."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradbal.demo.data import HEIGHT, WIDTH, Pictures

Scores = dict[str, float]
HIGHER_IS_BETTER = {"left": True, "right": True, "distance": False}
TASKS = tuple(HIGHER_IS_BETTER)
CHANNELS, FEATURES, HIDDEN = 16, 64, 32


class TwoDigitNet(nn.Module):
    """Reads both digits and how far apart they are.

    Args:
        centre: Mean distance of the training pictures, in pixels.
        spread: Its standard deviation.
    """

    def __init__(self, centre: float, spread: float) -> None:
        super().__init__()
        self.centre, self.spread = centre, spread
        self.trunk = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * CHANNELS * (HEIGHT // 4) * (WIDTH // 4), FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({"left": _head(10), "right": _head(10), "distance": _head(1)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        out = {task: head(features) for task, head in self.heads.items()}
        out["distance"] = self.centre + self.spread * out["distance"].squeeze(1)
        return out


def _head(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs))


def losses_of(model: TwoDigitNet, batch: Pictures) -> dict[str, Tensor]:
    """Return one loss per task: two cross-entropies and a squared error in units of the spread."""
    out = model(batch.images)
    gap = (out["distance"] - batch.distance) / model.spread
    return {
        "left": F.cross_entropy(out["left"], batch.left),
        "right": F.cross_entropy(out["right"], batch.right),
        "distance": gap.square().mean(),
    }


@torch.no_grad()
def scores_of(model: TwoDigitNet, pictures: Pictures) -> Scores:
    """Return the accuracy of each digit and the mean absolute error of the distance in pixels."""
    out = model(pictures.images)
    return {
        "left": (out["left"].argmax(dim=1) == pictures.left).float().mean().item(),
        "right": (out["right"].argmax(dim=1) == pictures.right).float().mean().item(),
        "distance": (out["distance"] - pictures.distance).abs().mean().item(),
    }
