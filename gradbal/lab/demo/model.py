"""The demo's problem and network: two digits, and how far apart they are in pixels."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradbal.lab.models.two_digits import HEADS, STAGES
from gradbal.lab.problems.losses import cross_entropy
from gradbal.lab.problems.metrics import Accuracy, Errors
from gradbal.lab.problems.pictures import COPIES, two_digits
from gradbal.lab.problems.problem import Examples, Problem, Split, Task
from gradbal.lab.training.loop import figures
from gradbal.lab.training.summary import main_figures

Scores = dict[str, float]  # the main figure of each task
HIGHER_IS_BETTER = {"left": True, "right": True, "distance": False}
TASKS = tuple(HIGHER_IS_BETTER)
BATCH = 64


def problem(seed: int, copies: tuple[int, int, int] = COPIES, device: str = "cpu") -> Problem:
    """Return the pictures with distances in pixels.

    Args:
        seed: Of the pictures.
        copies: Size of the data set, see :func:`gradbal.lab.problems.pictures.two_digits`.
        device: Where the pictures are.
    """
    train, validation, test = (part.to(torch.device(device)) for part in two_digits(seed, copies))
    digit = Task(cross_entropy, Accuracy, "accuracy")
    return Problem(
        name="two_digits",
        tasks={
            "left": digit,
            "right": digit,
            "distance": Task(partial(_squared_error, deviation(train)), Errors, "mae"),
        },
        train=train,
        validation=validation,
        test=test,
        stages=STAGES,
        heads=HEADS,
        batch=BATCH,
    )


def deviation(pictures: Examples) -> float:
    """Return the standard deviation of the distances."""
    return pictures.y["distance"].std().item()


def _squared_error(spread: float, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error in units of a deviation."""
    return ((outputs[:, 0] - targets) / spread).square().mean()


class TwoDigitNet(nn.Module):
    """Reads both digits and how far apart they are in pixels.

    Args:
        data: The pictures; distances for training set mean and deviation.
        body: From pictures to outputs by task, see
            :func:`gradbal.lab.models.architectures.build`.
    """

    def __init__(self, data: Problem, body: nn.Module) -> None:
        super().__init__()
        train: Any = data.train  # in memory
        self.centre, self.spread = train.y["distance"].mean().item(), deviation(train)
        self.body = body

    def forward(self, images: Tensor, return_aux: bool = False) -> Any:
        """Return outputs by task, and on request the auxiliary losses, as arch_zoo's models do."""
        outputs, aux = self.body(images, return_aux=True)
        outputs["distance"] = self.centre + self.spread * outputs["distance"]
        return (outputs, aux) if return_aux else outputs


def scores_of(model: TwoDigitNet, data: Problem, pictures: Split) -> Scores:
    """Return the accuracy of each digit and the mean absolute error of the distance in pixels."""
    device = str(next(model.parameters()).device)
    found = figures(model, data.tasks, pictures, len(pictures), device)
    # in float32, which decides how shares that end in 5 are rounded in a table
    return {t: torch.tensor(score).item() for t, score in main_figures(found, data.tasks).items()}
