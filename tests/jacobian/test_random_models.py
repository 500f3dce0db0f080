"""Random models against lone passes: any engine, rule, packing and sharing gives the same step."""

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradbal import MTLOptimizer, aggregate
from gradbal.rules._registry import make_rule

WIDTH, BATCH = 6, 5
ENGINES = ("sequential", "batched", "factored", "streaming", "auto")
RULES = ("upgrad", "mgda", "cagrad", "imtl_g", "config", "aligned_mtl", "nash_mtl", "dualproj")
DEVIATION = 1e-9


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))  # 0-dim, as a learned temperature

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:]) * self.scale


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[..., None]).unbind(-1)
        return x + torch.einsum("bij,bj->bi", (q[..., None] * k[:, None]).softmax(-1), v)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(x).chunk(2, dim=-1)
        return a.tanh() * b.sigmoid()


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, None]).mean(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "norm": Norm,
    "gated": Gated,
    "convolved": Convolved,
    "attention": Attention,
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda y, t: (y - t).square().mean(),
    "absolute": functional.smooth_l1_loss,
    "logits": lambda y, t: functional.binary_cross_entropy_with_logits(y, (t > 0).to(y)),
    "log": lambda y, t: (y - t).square().mean().add(1).log(),
}


class Model(nn.Module):
    """A trunk of random layers, branches that some tasks share, and heads, packed or not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = choose = Random(seed)
        self.m = choose.randint(2, 4)
        self.trunk = self.stack(choose.randint(1, 4))
        self.branches = nn.ModuleList(self.stack(choose.randint(0, 2)) for _ in range(2))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(self.m))
        self.branch = [choose.randint(-1, 1) for _ in range(self.m)]  # -1: the trunk itself
        self.tied = choose.random() < 0.2
        self.pack = choose.choice(["apart", "cat", "stack", "index", "losses", "weighted losses"])
        self.kinds = [choose.choice(list(LOSSES)) for _ in range(self.m)]
        generator = torch.Generator().manual_seed(seed)
        self.double()
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) / 2)
        self.x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
        self.t = torch.randn(self.m, BATCH, 2, generator=generator, dtype=torch.float64)

    def stack(self, depth: int) -> nn.Sequential:
        names = [self.random.choice(list(LAYERS)) for _ in range(depth)]
        return nn.Sequential(*(LAYERS[name]() for name in names))

    def outputs(self) -> list[Tensor]:
        z = self.trunk(self.x)
        if self.tied:
            z = z + self.trunk(z.tanh())
        features = [branch(z) for branch in self.branches] + [z]
        return [head(features[i]) for head, i in zip(self.heads, self.branch, strict=True)]

    def losses(self, pack: str) -> list[Tensor] | Tensor:
        """Compute the losses, joining what the model joins, or nothing at all."""
        y = self.outputs()
        if pack == "cat":
            joined = torch.cat(y, dim=1).tanh()
            y = [joined[:, 2 * i : 2 * i + 2] for i in range(self.m)]
        elif pack == "stack":
            y = list(torch.stack(y, dim=1).tanh().unbind(1))
        elif pack == "index":
            joined = y[0].new_zeros(BATCH, 2 * self.m)
            for i, part in enumerate(y):
                joined[:, 2 * i : 2 * i + 2] = part
            y = list(joined.tanh().split(2, dim=1))
        elif pack == "apart, as packed":
            y = [part.tanh() for part in y]
        losses = [LOSSES[k](part, t) for k, part, t in zip(self.kinds, y, self.t, strict=True)]
        if pack == "losses":
            return torch.cat([loss.view(1) for loss in losses])
        if pack == "weighted losses":
            return torch.arange(1.0, self.m + 1).double() * torch.stack(losses)
        if pack == "as weighted":
            return [loss * (i + 1) for i, loss in enumerate(losses)]
        return losses

    def plain(self) -> list[Tensor]:
        """Compute the same losses without joining anything."""
        as_packed = {
            **dict.fromkeys(("cat", "stack", "index"), "apart, as packed"),
            "weighted losses": "as weighted",
        }
        return list(self.losses(as_packed.get(self.pack, "apart")))


def expected(model: Model, rule: str, *, groups: bool) -> list[Tensor | None]:
    """Return each parameter's gradient from lone passes and the rule on their rows."""
    params, losses = list(model.parameters()), model.plain()
    rows = [torch.autograd.grad(x, params, retain_graph=True, allow_unused=True) for x in losses]
    reach = [[k for k, row in enumerate(rows) if row[n] is not None] for n in range(len(params))]
    shared = [n for n, tasks in enumerate(reach) if len(tasks) > 1]
    out: list[Tensor | None] = []
    for n, tasks in enumerate(reach):
        out.append(None if not tasks else rows[tasks[0]][n])
    factor = make_rule(rule).scale == "mean"
    for group in [[n] for n in shared] if groups else [shared]:
        tasks = sorted({k for n in group for k in reach[n]})
        if not group:
            continue
        jacobian = torch.stack([flat([rows[k][n] for n in group], params, group) for k in tasks])
        direction = aggregate(jacobian, rule).direction * (len(tasks) if factor else 1)
        for n, part in zip(group, direction.split([params[n].numel() for n in group]), strict=True):
            out[n] = part.view_as(params[n])
    return out


def flat(row: list[Tensor | None], params: list[Tensor], group: list[int]) -> Tensor:
    """Join the gradients of some parameters, with zeros for those that a task does not reach."""
    pairs = zip(row, group, strict=True)
    return torch.cat(
        [(torch.zeros_like(params[n]) if g is None else g).flatten() for g, n in pairs]
    )


def check(seed: int) -> None:
    model, choose = Model(seed), Random(seed + 1)
    rule, engine = choose.choice(RULES), choose.choice(ENGINES)
    groups = choose.random() < 0.2
    options = {"groups": "tensor"} if groups else {}
    if groups and engine == "streaming":
        engine = "sequential"
    wanted = expected(model, rule, groups=groups)
    optimizer = MTLOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), rule, engine=engine, heads="plain", **options
    )
    for _ in range(choose.randint(1, 2)):
        optimizer.step(model.losses(model.pack))
    size = max(grad.abs().amax().item() for grad in wanted if grad is not None)
    last = optimizer.last
    if last is not None and last.weights is not None and last.grams:  # large ones cancel
        norms = max(gram.diagonal().max().sqrt().item() for gram in last.grams.values())
        size = max(size, last.weights.abs().max().item() * norms)
    where = f"seed {seed}: {rule}, {engine}, {options}, {model.pack}"
    for param, grad in zip(model.parameters(), wanted, strict=True):
        assert (param.grad is None) == (grad is None), where
        if grad is not None and param.grad is not None:
            assert (param.grad - grad).abs().amax() <= DEVIATION * max(size, 1), where


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_random_models(first: int) -> None:
    for seed in range(first, first + 20):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(160, 5160, 100))
def test_many_random_models(first: int) -> None:
    for seed in range(first, first + 100):
        check(seed)
