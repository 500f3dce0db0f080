"""Hooks of users change each task's gradient once, whatever the engine."""

from collections.abc import Callable

import pytest
import torch
from models import assert_same, data, fill, wrapped
from torch import Tensor, nn

from gradbal import engines

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda w: w.t(),
    "view": lambda w: w.view(64, 64).t(),
    "cast": lambda w: w.double().t(),
    "permute": lambda w: w.permute(1, 0),
}
ENGINES = {
    "batched": engines.Batched(),
    "factored": engines.Factored(),
    "factored, all at once": engines.Factored(chunk_size=None),
    "streaming": engines.Streaming(within=engines.Factored()),
    "streaming in pieces": engines.Streaming(segments=3),
}


class Hooked(nn.Module):
    """A weight whose view has a hook, under two heads."""

    def __init__(self, view: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(64, 64))
        self.first = nn.Linear(64, 64)
        self.heads = nn.ModuleList(nn.Linear(64, 2) for _ in range(3))
        self.view = VIEWS[view]
        fill(self)

    def losses(self) -> list[Tensor]:
        w = self.view(self.weight)
        w.register_hook(lambda grad: 0.01 * grad)
        z = (self.first(data(8, 64)).tanh() @ w).tanh()
        return [(head(z) - i).square().mean() for i, head in enumerate(self.heads)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_hook_on_a_view_of_a_weight(
    view: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "gradbal.jacobian.factored.CALLS", -(10**12)
    )  # products wherever they can be
    found = []
    for chosen in (ENGINES[engine], engines.Sequential()):
        model = Hooked(view)
        optimizer = wrapped(model, "upgrad", engine=chosen)
        for _ in range(2):
            optimizer.step(model.losses())
        found.append([param.detach() for param in model.parameters()])
    assert_same(found[0], found[1], 1e-10)


def encoders() -> tuple[nn.ModuleList, Callable[[], list[Tensor]]]:
    """Two encoders, of which the first meets the second twice and learns slowly."""
    a, b1, b2 = (nn.Linear(6, 6) for _ in range(3))
    heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(2))
    modules = fill(nn.ModuleList([a, b1, b2, heads]))

    def losses() -> list[Tensor]:
        x = data(8, 6)
        f = a(x).tanh()
        f.register_hook(lambda grad: 10 * grad)
        z = b2(b1(x).tanh()).tanh()
        return [h(f + z.sin() * f).square().mean() * s for h, s in zip(heads, (1, 3), strict=True)]

    return modules, losses


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_a_hook_at_an_edge_that_stays_open_runs_once(segments: int) -> None:
    grams = []
    for engine in (engines.Sequential(), engines.Streaming(segments=segments)):
        modules, losses = encoders()
        optimizer = wrapped(modules, "upgrad", engine=engine)
        optimizer.step(losses())
        assert optimizer.last is not None
        grams.append(optimizer.last.grams["model"])
    assert_same([grams[1]], [grams[0]], 1e-12)


@pytest.mark.parametrize("segments", [1, 2, 3, 4])
def test_no_hook_is_given_none(segments: int) -> None:
    found = []
    for engine in (engines.Sequential(), engines.Streaming(segments=segments)):
        body = fill(nn.ModuleList(nn.Linear(6, 6) for _ in range(4)))
        heads = fill(nn.ModuleList(nn.Linear(6, 1) for _ in range(3)), seed=1)
        f = body[0](data(8, 6)).tanh()
        f.register_hook(lambda grad: grad.clamp(-1, 1))
        e2 = body[3](f).tanh()
        e1 = body[2](body[1](f).tanh()).tanh()
        losses = [heads[0](e1), heads[1](e1 * e2), heads[2](e2)]
        optimizer = wrapped(nn.ModuleList([body, heads]), "upgrad", engine=engine)
        optimizer.backward([loss.square().mean() for loss in losses])
        found.append([param.grad for param in body.parameters()])
    assert_same(found[1], found[0], 1e-12)


@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_hooks_after_accumulation_run_once_when_the_gradient_is_complete(rule: str) -> None:
    trunk, heads = fill(nn.Linear(4, 5)), fill(nn.ModuleList(nn.Linear(5, 1) for _ in range(2)))
    modules = nn.ModuleList([trunk, heads])
    seen: dict[int, Tensor] = {}
    calls: list[int] = []

    def note(param: Tensor) -> None:
        assert param.grad is not None
        calls.append(id(param))
        seen[id(param)] = param.grad.clone()

    for param in modules.parameters():
        param.register_post_accumulate_grad_hook(note)
    optimizer = wrapped(modules, rule)
    z = trunk(data(6, 4)).tanh()
    losses = [head(z).square().mean() for head in heads]
    optimizer.backward(losses, aux=trunk.weight.square().sum())
    assert sorted(calls) == sorted(map(id, modules.parameters()))
    for param in modules.parameters():
        assert torch.equal(seen[id(param)], param.grad)
