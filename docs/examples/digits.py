"""What the examples share: pictures of two digits, a network with three heads, and its losses."""

import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

import gradbal
from gradbal.lab.models.two_digits import HEIGHT, WIDTH
from gradbal.lab.problems.problem import Examples

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 5
BATCH = 50  # pictures, in all processes together
CLASSES = {"left": 10, "right": 10, "larger": 2}  # which digits, and whether the left is larger


class Net(nn.Module):
    """A trunk of four layers with one head per task."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        size = 32 * (HEIGHT // 4) * (WIDTH // 4)
        self.trunk = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.heads = nn.ModuleDict({task: nn.Linear(64, n) for task, n in CLASSES.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(self.pixels(images))
        return {task: head(features) for task, head in self.heads.items()}


def labels_of(batch: Examples) -> dict[str, Tensor]:
    """Return the label of every task."""
    left, right = batch.y["left"], batch.y["right"]
    return {"left": left, "right": right, "larger": (left > right).long()}


def losses_of(net: nn.Module, batch: Examples) -> dict[str, Tensor]:
    """Return the mean loss of every task over the samples of this process."""
    outputs, labels = net(batch.x), labels_of(batch)
    return {task: nn.functional.cross_entropy(outputs[task], labels[task]) for task in labels}


def batches(pictures: Examples, epoch: int, part: int = 0, parts: int = 1) -> Iterator[Examples]:
    """Shuffle alike in all processes, and yield a part of each batch."""
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(epoch))
    for index in order.split(BATCH):
        yield pictures.take(index[part::parts])


@torch.no_grad()
def accuracies(net: nn.Module, pictures: Examples) -> dict[str, float]:
    """Return the share of right answers, by task."""
    outputs, labels = net(pictures.x), labels_of(pictures)
    right = {task: outputs[task].argmax(dim=1) == labels[task] for task in labels}
    return {task: float(hits.float().mean()) for task, hits in right.items()}


def report(epoch: int, scores: Mapping[str, float], optimizer: gradbal.MTLOptimizer) -> None:
    """Print the accuracy of every task, and its weight in the last step."""
    metrics = optimizer.metrics()
    columns = [
        f"{task} {score:.3f} (weight {float(metrics[f'gradbal/weight/{task}']):.2f})"
        for task, score in scores.items()
    ]
    print(f"epoch {epoch + 1:2d}:", ", ".join(columns), flush=True)
