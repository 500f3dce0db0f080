"""Clicks and conversions of drawn users and items, learned by five architectures.

Prints the table of `docs/recommenders.md` and draws its picture:

    python docs/examples/recommender.py --picture docs/recommenders.png
"""

import argparse
from collections.abc import Callable
from itertools import pairwise
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

import arch_zoo
import gradbal

USERS, ITEMS, WIDTH, BATCH = 600, 300, 16, 2048


class Impressions(NamedTuple):
    """Who saw what, whether it was clicked, and whether a click converts or would convert."""

    batch: dict[str, Tensor]
    click: Tensor
    conversion: Tensor


def draw(n: int, seed: int) -> tuple[Impressions, Impressions]:
    """Return impressions for training and for the test, of the same users and items.

    Tastes have six dimensions. The score of a conversion shares a part with that of a click, and
    about one impression in twenty is clicked. Conversions of what was not clicked are known here
    and are used in the test alone.
    """
    g = torch.Generator().manual_seed(seed)
    user, item = torch.randn(USERS, 6, generator=g), torch.randn(ITEMS, 6, generator=g)
    other = torch.randn(USERS, 6, generator=g)

    def some(n: int) -> Impressions:
        u = torch.randint(0, USERS, (n,), generator=g)
        i = torch.randint(0, ITEMS, (n,), generator=g)
        score = (user[u] * item[i]).sum(1) / 6**0.5
        buys = 0.8 * score + 0.6 * (other[u] * item[i]).sum(1) / 6**0.5
        click = torch.rand(n, generator=g) < torch.sigmoid(1.5 * score - 4)
        conversion = torch.rand(n, generator=g) < torch.sigmoid(1.5 * buys - 1)
        return Impressions({"user": u, "item": i}, click.float(), conversion.float())

    return some(n), some(n // 4)


class Embed(nn.Module):
    """Sparse embeddings of users and items, and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, WIDTH, sparse=True)
        self.item = nn.Embedding(ITEMS, WIDTH, sparse=True)
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        u, i = self.user(batch["user"]), self.item(batch["item"])
        return torch.cat([u, i, u * i], dim=1)


def tower(*sizes: int) -> nn.Module:
    """Return a perceptron of these widths."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def heads(width: int = 32) -> dict[str, nn.Module]:
    """Return a tower per task."""
    return {"click": tower(width, 16, 1), "conversion": tower(width, 16, 1)}


def expert() -> nn.Module:
    """Return a layer on the embeddings."""
    return nn.Sequential(tower(3 * WIDTH, 32), nn.ReLU())


def second() -> nn.Module:
    """Return a layer above such experts."""
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU())


def aitm() -> nn.Module:
    """Return the chain from clicks to clicks that convert."""
    own = {name: expert() for name in ("click", "buy")}
    last = {name: tower(32, 16, 1) for name in own}
    return arch_zoo.AITM(Embed, own, last, width=32, calibrator_weight=0.0)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "HPS": lambda: arch_zoo.HPS([Embed, expert], heads()),
    "MMoE": lambda: arch_zoo.MMoE(expert, heads(), num_experts=4, stem=Embed),
    "PLE": lambda: arch_zoo.PLE(
        [expert, second], heads(), num_shared=2, num_specific=1, stem=Embed
    ),
    "ESMM": lambda: arch_zoo.ESMM([Embed, expert], tower(32, 16, 1), tower(32, 16, 1)),
    "AITM": aitm,
}


def losses(name: str, model: nn.Module, part: Impressions) -> dict[str, Tensor]:
    """Return the losses of a batch: conversions among clicks, or clicks that convert among all."""
    outputs = {task: y.squeeze(1) for task, y in model(part.batch).items()}
    bought = part.click * part.conversion
    if name == "ESMM":
        return {"click": bce(outputs["ctr"], part.click), "buy": bce(outputs["ctcvr"], bought)}
    if name == "AITM":
        return {"click": bce(outputs["click"], part.click), "buy": bce(outputs["buy"], bought)}
    each = bce(outputs["conversion"], part.conversion, reduction="none")
    return {
        "click": bce(outputs["click"], part.click),
        "conversion": (part.click * each).mean(),
    }


@torch.no_grad()
def scores(name: str, model: nn.Module, part: Impressions) -> dict[str, Tensor]:
    """Return scores of a click, of a conversion given a click, and of both."""
    y = {task: out.squeeze(1) for task, out in model.eval()(part.batch).items()}
    log = torch.nn.functional.logsigmoid
    if name == "ESMM":
        return {"click": y["ctr"], "conversion": y["cvr"], "both": y["ctcvr"]}
    if name == "AITM":
        return {
            "click": y["click"],
            "conversion": log(y["buy"]) - log(y["click"]),
            "both": y["buy"],
        }
    both = log(y["click"]) + log(y["conversion"])
    return {"click": y["click"], "conversion": y["conversion"], "both": both}


def auc(score: Tensor, label: Tensor) -> float:
    """Return the chance that a positive scores above a negative."""
    ranks = score.argsort().argsort().double() + 1
    positives = label.sum().double()
    total = ranks[label > 0].sum() - positives * (positives + 1) / 2
    return (total / positives / (len(label) - positives)).item()


def train(
    name: str, data: tuple[Impressions, Impressions], seed: int, epochs: int
) -> dict[str, float]:
    """Train a model and return its AUCs on the test."""
    torch.manual_seed(seed)
    learn, test = data
    model = MODELS[name]()
    model.initialize({key: x[:2] for key, x in learn.batch.items()})
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    held = {id(table) for table in tables}
    dense = [p for p in model.parameters() if id(p) not in held]
    optimizers = [torch.optim.SparseAdam(tables, lr=1e-2), torch.optim.Adam(dense, lr=1e-3)]
    optimizer = gradbal.MTLOptimizer(optimizers, "upgrad")
    for _ in range(epochs):
        for rows in torch.randperm(len(learn.click)).split(BATCH):
            batch = {key: x[rows] for key, x in learn.batch.items()}
            part = Impressions(batch, learn.click[rows], learn.conversion[rows])
            optimizer.step(losses(name, model, part))
    found = scores(name, model, test)
    return {
        "click": auc(found["click"], test.click),
        "conversion": auc(found["conversion"], test.conversion),
        "both": auc(found["both"], test.click * test.conversion),
    }


def draw_picture(results: dict[str, list[dict[str, float]]], path: str) -> None:
    """Draw the AUC of conversions of every seed, and the means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    panel = figure.subplots()
    for number, rows in enumerate(results.values()):
        values = [row["conversion"] for row in rows]
        panel.plot([number] * len(values), values, "o", color="0.6", markersize=4)
        panel.plot([number - 0.2, number + 0.2], [mean(values)] * 2, color="black")
    panel.set_xticks(range(len(results)), list(results))
    panel.set_ylabel("AUC of conversions\non all impressions")
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, print the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--impressions", type=int, default=150_000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--picture")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        data = draw(options.impressions, seed)
        for name, rows in results.items():
            rows.append(train(name, data, seed, options.epochs))
    print(f"{data[0].click.mean():.1%} of the last impressions are clicked")
    print("| architecture | clicks | conversions, all impressions | clicks that convert |")
    print("|---|--:|--:|--:|")
    for name, rows in results.items():
        cells = [name]
        for key in ("click", "conversion", "both"):
            values = [row[key] for row in rows]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{mean(values):.3f} ± {spread:.3f}")
        print("| " + " | ".join(cells) + " |")
    if options.picture:
        draw_picture(results, options.picture)


if __name__ == "__main__":
    main()
