"""A small network with three heads, its losses and its scores."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradbal.lab.problems.pictures import Pictures

Scores = dict[str, float]
HIGHER_IS_BETTER = {"left": True, "right": True, "distance": False}
TASKS = tuple(HIGHER_IS_BETTER)


class TwoDigitNet(nn.Module):
    """Reads both digits and how far apart they are.

    Args:
        centre: Mean distance of the training pictures, in pixels.
        spread: Its standard deviation.
        body: From pictures to outputs by task, see :func:`gradbal.lab.models.architectures.build`.
    """

    def __init__(self, centre: float, spread: float, body: nn.Module) -> None:
        super().__init__()
        self.centre, self.spread = centre, spread
        self.body = body

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs, aux = self.body(images, return_aux=True)
        outputs["distance"] = self.centre + self.spread * outputs["distance"].squeeze(1)
        return outputs, aux

    def end_epoch(self) -> None:
        """Let an architecture with a temperature cool down."""
        schedule: Any = getattr(self.body, "tau", None)  # of an architecture known by name only
        if schedule is not None:
            schedule.step()


def losses_of(model: TwoDigitNet, batch: Pictures) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return one loss per task, and the auxiliary losses of the architecture.

    The first two are cross-entropies, the third is a squared error in units of the spread.
    """
    out, aux = model(batch.images)
    gap = (out["distance"] - batch.distance) / model.spread
    losses = {
        "left": F.cross_entropy(out["left"], batch.left),
        "right": F.cross_entropy(out["right"], batch.right),
        "distance": gap.square().mean(),
    }
    return losses, aux


@torch.no_grad()
def scores_of(model: TwoDigitNet, pictures: Pictures) -> Scores:
    """Return the accuracy of each digit and the mean absolute error of the distance in pixels."""
    model.eval()
    out, _ = model(pictures.images)
    model.train()
    return {
        "left": (out["left"].argmax(dim=1) == pictures.left).float().mean().item(),
        "right": (out["right"].argmax(dim=1) == pictures.right).float().mean().item(),
        "distance": (out["distance"] - pictures.distance).abs().mean().item(),
    }
