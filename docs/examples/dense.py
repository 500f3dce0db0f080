"""Classes and depths of drawn scenes, learned by three architectures.

Prints the table of `docs/dense.md` and draws its picture:

    python docs/examples/dense.py --picture docs/dense.png
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import arch_zoo
import gradbal

SIDE, CLASSES, BATCH = 24, 4, 16


class Scenes(NamedTuple):
    """Pictures ``[n, 3, 24, 24]``, the class of each pixel, and its depth between 0 and 1."""

    picture: Tensor
    classes: Tensor
    depth: Tensor


def draw(n: int, seed: int) -> Scenes:
    """Return scenes of up to five boxes and discs before a floor that comes closer.

    A class has a colour of its own, blurred by shading and noise; what is nearer hides what is
    farther and is brighter.
    """
    g = torch.Generator().manual_seed(seed)
    rows = torch.linspace(0, 1, SIDE)
    depth = (1 - rows)[:, None].expand(n, SIDE, SIDE).clone()
    classes = torch.zeros(n, SIDE, SIDE, dtype=torch.long)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for _ in range(5):
        there = torch.rand(n, 1, 1, generator=g) < 0.7
        cy, cx = (torch.randint(0, SIDE, (n, 1, 1), generator=g) for _ in range(2))
        size = torch.randint(3, 9, (n, 1, 1), generator=g)
        far = torch.rand(n, 1, 1, generator=g)
        kind = torch.randint(1, CLASSES, (n, 1, 1), generator=g)
        box = ((y - cy).abs() <= size) & ((x - cx).abs() <= size)
        disc = (y - cy) ** 2 + (x - cx) ** 2 <= size**2
        seen = torch.where(kind == 1, box, disc) & there & (far < depth)
        classes, depth = torch.where(seen, kind, classes), torch.where(seen, far, depth)
    colours = torch.tensor([[0.4, 0.4, 0.4], [0.6, 0.4, 0.3], [0.3, 0.6, 0.4], [0.4, 0.4, 0.6]])
    picture = colours[classes] * (1.2 - 0.7 * depth)[..., None]
    picture = picture + 0.12 * torch.randn(picture.shape, generator=g)
    return Scenes(picture.movedim(-1, 1), classes, depth)


class Pyramid(nn.Module):
    """Three maps, each half as large as the one before."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 24, 32)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, 1 + (number > 0), 1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for number, (before, after) in enumerate(pairwise(widths))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Finest(nn.Module):
    """A pyramid joined to one map."""

    def __init__(self) -> None:
        super().__init__()
        self.pyramid = Pyramid()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.pyramid(x)
        return torch.cat([interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps], 1)


OUTPUTS = {"classes": CLASSES, "depth": 1}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "HPS": lambda: arch_zoo.HPS(
        Pyramid(), {task: arch_zoo.FPNHead(n, 48) for task, n in OUTPUTS.items()}
    ),
    "PAD-Net": lambda: arch_zoo.PADNet(Finest(), OUTPUTS, channels=16),
    "MTI-Net": lambda: arch_zoo.MTINet(Pyramid(), OUTPUTS, [16, 24, 32], hidden=48),
}


def depth_loss(y: Tensor, target: Tensor) -> Tensor:
    """Return the mean absolute error."""
    return (y.squeeze(1) - target).abs().mean()


CRITERIA = {"classes": cross_entropy, "depth": depth_loss}


@torch.no_grad()
def figures(model: nn.Module, test: Scenes) -> dict[str, float]:
    """Return what the table shows of a model."""
    parts = [model.eval()(part) for part in test.picture.split(100)]
    guess = torch.cat([part["classes"].argmax(1) for part in parts])
    shares = []
    for number in range(CLASSES):
        one, other = guess == number, test.classes == number
        shares.append(((one & other).sum() / (one | other).sum()).item())
    depth = torch.cat([part["depth"] for part in parts])
    size = sum(p.numel() for p in model.parameters())
    error = depth_loss(depth, test.depth).item()
    return {"miou": mean(shares), "depth": error, "parameters": size}


def train(name: str, learn: Scenes, seed: int, epochs: int) -> nn.Module:
    """Return a trained model."""
    torch.manual_seed(seed)
    model = MODELS[name]().initialize(learn.picture[:2])
    base = torch.optim.Adam(model.parameters(), lr=2e-3)
    optimizer = gradbal.MTLOptimizer(base, "upgrad")
    for _ in range(epochs):
        for rows in torch.randperm(len(learn.picture)).split(BATCH):
            result = model.run(learn.picture[rows])
            targets = {"classes": learn.classes[rows], "depth": learn.depth[rows]}
            optimizer.step(arch_zoo.task_losses(result, CRITERIA, targets))
    return model


def draw_picture(model: nn.Module, test: Scenes, path: str) -> None:
    """Draw three scenes of the test with what a model makes of them."""
    from matplotlib.figure import Figure

    outputs = model.eval()(test.picture[:3])
    figure = Figure(figsize=(6, 4), layout="constrained")
    panels = figure.subplots(3, 5)
    names = ("scene", "classes", "found", "depth", "found")
    for row in range(3):
        maps = (
            test.picture[row].movedim(0, -1).clamp(0, 1),
            test.classes[row],
            outputs["classes"][row].argmax(0),
            test.depth[row],
            outputs["depth"][row, 0].detach(),
        )
        for column, picture in enumerate(maps):
            panel = panels[row, column]
            panel.imshow(picture, cmap="gray", vmin=0, vmax=3 if column in (1, 2) else 1)
            panel.set_xticks([]), panel.set_yticks([])
            if row == 0:
                panel.set_title(names[column], fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        learn, test = draw(options.scenes, seed), draw(400, 1000 + seed)
        for name, rows in results.items():
            model = train(name, learn, seed, options.epochs)
            rows.append(figures(model, test))
    print("| architecture | parameters | mean IoU | absolute error of depth |")
    print("|---|--:|--:|--:|")
    for name, rows in results.items():
        cells = [name, f"{rows[0]['parameters']:,}"]
        for key in ("miou", "depth"):
            values = [row[key] for row in rows]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{mean(values):.3f} ± {spread:.3f}")
        print("| " + " | ".join(cells) + " |")
    if options.picture:
        draw_picture(model, test, options.picture)


if __name__ == "__main__":
    main()
