"""Streaming against Sequential: the same Gram matrices and directions, a piece at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graph_cases import CASES
from models import data, grads, param, same_as_sequential, square, wrapped
from torch import Tensor
from zoo import ZOO

from gradbal import engines
from gradbal.graph import make_plan
from gradbal.pieces import split

ENGINES = {
    "one by one": engines.Streaming(),
    "all at once": engines.Streaming(within=engines.Batched()),
    "chunks, factored": engines.Streaming(4, within=engines.Factored(chunk_size=2)),
}
each = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of torch.compile


@pytest.fixture(autouse=True)
def smallest_pieces(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """Cut wherever it can be done, unless a test asks otherwise; note the number of pieces."""
    counts: list[int] = []

    def cut(top: Any, index: Any, sizes: Any, limit: float) -> Any:
        limit = limit if "real_pieces" in request.fixturenames else 0
        counts.append(len(pieces := split(top, index, sizes, limit)))
        return pieces

    monkeypatch.setattr(engines, "split", cut)
    return counts


@pytest.fixture
def real_pieces() -> None:
    """Leave the size of pieces to the engine."""


@pytest.mark.parametrize("name", ZOO)
@each
def test_zoo(name: str, engine: engines.Engine) -> None:
    model = ZOO[name]()
    same_as_sequential(list(model.parameters()), model.losses, engine)


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
@each
def test_graphs(build: Callable[[], Any], engine: engines.Engine) -> None:
    params, losses = build()
    tol = 1e-6 if build.__name__ == "losses_of_two_dtypes" else 1e-10
    same_as_sequential(params, losses, engine, tol)


def random_graph(seed: int) -> tuple[list[torch.nn.Parameter], Callable[[], list[Tensor]]]:
    """Products shared at random and meeting at random, far below where the tasks meet."""
    draw = torch.Generator().manual_seed(seed)

    def some(limit: int, count: int) -> list[int]:
        return torch.randint(limit, (count,), generator=draw).tolist()

    weights = [param(3, 3, seed=seed * 10 + i) for i in range(6)]
    steps = [(some(i + 1, 2), some(6, 1)[0]) for i in range(10)]
    own = [param(3, seed=500 + i) for i in range(3)]

    def losses() -> list[Tensor]:
        nodes = [data(2, 3, seed=seed)]
        for sources, which in steps:
            nodes.append((sum(nodes[i] for i in sources) @ weights[which]).tanh())
        return [square(sum(nodes[-3:]) @ mine - k) for k, mine in enumerate(own)]

    return [*weights, *own], losses


@pytest.mark.parametrize("seed", range(30))
@each
def test_random_graphs(seed: int, engine: engines.Engine) -> None:
    same_as_sequential(*random_graph(seed), engine)
