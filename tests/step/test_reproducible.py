"""Same seed, same run: again, on resume, with every engine, and nobody else's random numbers."""

import random
from typing import Any

import numpy
import pytest
import torch
from cases import ONE_BATCH, keeps_gradients
from models import Toy, assert_same, frozen_copy
from torch.optim import SGD

from gradbal import MTLOptimizer, engines, make_rule

ALL = pytest.mark.parametrize("rule", ONE_BATCH)
ENGINES: dict[str, Any] = {
    "sequential": engines.Sequential(),
    "batched": engines.Batched(),
    "chunks": engines.Batched(chunk_size=2),
    "representation": engines.Representation(),
}
PAIRS = [
    (rule, engine)
    for rule in ONE_BATCH
    for engine in ENGINES
    if engine != "representation" or not keeps_gradients(make_rule(rule))
]


class Run:
    def __init__(self, rule: str, engine: str, seed: int = 3) -> None:
        self.model = Toy()
        base = SGD(self.model.parameters(), lr=0.05)
        self.optimizer = MTLOptimizer(base, rule, engine=ENGINES[engine], seed=seed)

    def steps(self, *batches: int) -> "Run":
        for batch in batches:
            self.optimizer.step(self.model.losses(batch))
        return self

    def resumed(self, rule: str, engine: str) -> "Run":
        other = Run(rule, engine, seed=0)
        other.model.load_state_dict(self.model.state_dict())
        other.optimizer.load_state_dict(self.optimizer.state_dict())
        return other

    def all(self) -> Any:
        return frozen_copy([dict(self.model.state_dict()), self.optimizer.state_dict()])


@pytest.mark.parametrize(("rule", "engine"), PAIRS)
def test_again_and_resumed(rule: str, engine: str) -> None:
    once = Run(rule, engine).steps(0, 1, 2, 3)
    torch.manual_seed(99)
    again = Run(rule, engine).steps(0, 1, 2, 3)
    resumed = Run(rule, engine).steps(0, 1).resumed(rule, engine).steps(2, 3)
    assert once.all() == again.all() == resumed.all()


@ALL
def test_engines_that_are_exact_draw_alike(rule: str) -> None:
    """Also when the engine changes on resume; equal up to rounding, not bit for bit."""
    reference = Run(rule, "sequential").steps(0, 1, 2, 3)
    others = [Run(rule, engine).steps(0, 1, 2, 3) for engine in ("batched", "chunks")]
    others.append(Run(rule, "batched").steps(0, 1).resumed(rule, "sequential").steps(2, 3))
    for other in others:
        assert_same(other.model.parameters(), reference.model.parameters(), 1e-8)


@pytest.mark.parametrize(("rule", "engine"), PAIRS)
def test_no_global_generator_is_touched(rule: str, engine: str) -> None:
    def states() -> list[Any]:
        numbers = numpy.random.get_state(legacy=True)
        return [torch.get_rng_state().tolist(), random.getstate(), numbers[1].tolist(), numbers[2]]

    run = Run(rule, engine)  # making the layers of a model draws
    before = states()
    losses = run.model.losses()
    run.optimizer.step(losses)
    run.optimizer.backward(run.model.losses(1))
    run.optimizer.check(run.model.losses(2))
    run.optimizer.explain(run.model.losses(2))
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    MTLOptimizer(SGD(run.model.parameters()), rule, engine=ENGINES[engine])
    assert states() == before
