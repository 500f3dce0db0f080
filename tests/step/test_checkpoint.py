"""Stop anywhere, save, load elsewhere, go on: bit for bit as if nothing had happened."""

import copy
import io
import logging
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cases import ONE_BATCH, WEIGHTED, keeps_gradients
from models import PUBLISHED, Toy, frozen_copy, wrapped
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import StepLR

from gradbal import MTLOptimizer, engines, make_rule
from gradbal.rules._base import LossRule
from gradbal.rules._registry import RULES

ALL = pytest.mark.parametrize("rule", ONE_BATCH)
KEYS = ["version", "rule", "tasks", "step", "generator", "state", "pending", "choice"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batched": {"engine": engines.Batched(2)},
    "representation": {"engine": "representation"},
    "reused": {"update_every": 3},
    "heads": {"heads": "plain"},
    "groups": {"groups": "tensor", "heads": "plain"},
    "weighted": {"heads": "weighted", "scale": "native"},
}
ELEMENTWISE = set(ONE_BATCH) - set(WEIGHTED)
IMPOSSIBLE = {  # loss rules have one group; elementwise rules have no weights
    "groups": {name for name in ONE_BATCH if issubclass(RULES[name].rule, LossRule)},
    "reused": ELEMENTWISE,
    "weighted": ELEMENTWISE,
    "representation": {name for name in ONE_BATCH if keeps_gradients(make_rule(name))},
}


class Run:
    """A model with its optimizer and schedule, and a step that may stop in many places."""

    def __init__(self, rule: Any, seed: int = 7, **options: Any) -> None:
        self.model = Toy()
        base = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        self.optimizer = MTLOptimizer(base, rule, seed=seed, **options)
        self.schedule = StepLR(self.optimizer, 3, 0.5)

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "grads": [p.grad for p in self.model.parameters()],
            },
            file,
        )
        return file.getvalue()

    def load(self, saved: bytes) -> "Run":
        found = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.schedule.load_state_dict(found["schedule"])
        for parameter, grad in zip(self.model.parameters(), found["grads"], strict=True):
            parameter.grad = grad
        return self

    def step(self, batch: int) -> None:
        names = "abc" if batch != 3 else "ac"
        losses = {k: v for k, v in self.model.named(batch).items() if k in names}
        self.optimizer.step(losses)
        self.schedule.step()

    def snapshot(self) -> Any:
        return frozen_copy([dict(self.model.state_dict()), self.optimizer.state_dict()])


@pytest.mark.parametrize(
    ("rule", "option"),
    [(r, o) for r in ONE_BATCH for o in OPTIONS if r not in IMPOSSIBLE.get(o, ())],
)
def test_stop_and_go_on(rule: str, option: str) -> None:
    straight, stopped = Run(rule, **OPTIONS[option]), Run(rule, **OPTIONS[option])
    for batch in range(6):
        straight.step(batch)
        stopped.step(batch)
        stopped = Run(rule, seed=99, **OPTIONS[option]).load(stopped.save())
        assert stopped.snapshot() == straight.snapshot()


@ALL
def test_stop_between_backward_and_step(rule: str) -> None:
    straight, stopped = Run(rule), Run(rule)
    for batch in range(3):
        for run in (straight, stopped):
            run.optimizer.zero_grad()
            run.optimizer.backward(run.model.named(batch))
        stopped = Run(rule, seed=99).load(stopped.save())
        for run in (straight, stopped):
            run.optimizer.step()
        assert stopped.snapshot() == straight.snapshot()


@ALL
def test_stop_inside_a_window(rule: str) -> None:
    straight, stopped = Run(rule), Run(rule)
    for batch in range(2):
        for piece in range(3):
            for run in (straight, stopped):
                losses = run.model.losses(batch, slice(2 * piece, 2 * piece + 2))
                aux = run.model.heads[0].weight.square().sum() / 3
                run.optimizer.backward([loss / 3 for loss in losses], aux=aux, accumulate=piece < 2)
            stopped = Run(rule, seed=99).load(stopped.save())
            assert stopped.snapshot() == straight.snapshot()
        for run in (straight, stopped):
            run.optimizer.step()
            run.optimizer.zero_grad()
        assert stopped.snapshot() == straight.snapshot()


def halfway(rule: str, **options: Any) -> Run:
    """Return a run after a few steps, in the middle of an accumulation window."""
    run = Run(rule, **options)
    for batch in range(3):
        run.step(batch)
    run.optimizer.backward(run.model.losses(3, slice(0, 3)), accumulate=True)
    return run


def rest(run: Run) -> Any:
    """Go on to the end and return all that there is."""
    run.optimizer.step(run.model.losses(3, slice(3, 6)))
    run.schedule.step()
    for batch in range(4, 6):
        run.step(batch)
    return run.snapshot()


def go_on(folder: str) -> None:
    """Finish every run saved in a folder; called in a process of its own."""
    for file in Path(folder).glob("*.saved"):
        run = Run(file.stem, seed=99).load(file.read_bytes())
        file.with_suffix(".done").write_bytes(pickle.dumps(rest(run)))


@pytest.mark.parametrize(
    "rules",
    [("uw", "graddrop"), pytest.param(ONE_BATCH, marks=pytest.mark.slow)],
    ids=["two", "all"],
)
def test_going_on_in_another_process(rules: Sequence[str], tmp_path: Path) -> None:
    for rule in rules:
        (tmp_path / f"{rule}.saved").write_bytes(halfway(rule).save())
    program = f"import test_checkpoint; test_checkpoint.go_on({str(tmp_path)!r})"
    here = Path(__file__).parent
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    for rule in rules:
        found = pickle.loads((tmp_path / f"{rule}.done").read_bytes())
        assert found == rest(halfway(rule)), rule


def distributed_parts(run: Run) -> dict[str, Any]:
    """Return what a script gives to ``torch.distributed.checkpoint``."""
    model, optimizer = get_state_dict(run.model, run.optimizer)
    parts = {"model": model, "optimizer": optimizer}
    return {**parts, "balancer": run.optimizer.core, "schedule": run.schedule}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("rule", "option"),
    [*((rule, "plain") for rule in ONE_BATCH), ("gradvac", "groups"), ("mgda", "reused")],
)
def test_distributed_checkpoint_into_a_fresh_optimizer(
    rule: str, option: str, tmp_path: Path
) -> None:
    """The reader fills only the keys that are there, and a fresh object has not all of them."""
    straight, stopped = halfway(rule, **OPTIONS[option]), halfway(rule, **OPTIONS[option])
    dcp.save(distributed_parts(stopped), checkpoint_id=tmp_path, no_dist=True)
    fresh = Run(rule, seed=99, **OPTIONS[option])
    parts = distributed_parts(fresh)
    dcp.load(parts, checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = parts["model"], parts["optimizer"]
    set_state_dict(fresh.model, fresh.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    assert rest(fresh) == rest(straight)


@ALL
def test_same_seed_same_run_other_seed_may_differ(rule: str) -> None:
    first, second, third = Run(rule), Run(rule), Run(rule, seed=8)
    for batch in range(3):
        for run in (first, second, third):
            run.step(batch)
    assert first.snapshot() == second.snapshot()
    if rule in ("rlw", "graddrop"):
        assert first.snapshot() != third.snapshot()


@ALL
def test_core_has_always_the_same_keys_and_holds_primitives_only(rule: str) -> None:
    run = Run(rule)
    states = [run.optimizer.core.state_dict()]
    run.step(0)
    states.append(run.optimizer.core.state_dict())
    run.optimizer.backward(run.model.named(1), accumulate=True)
    states.append(run.optimizer.core.state_dict())
    run.optimizer.discard()
    run.optimizer.backward(run.model.named(1))
    states.append(run.optimizer.core.state_dict())
    for state in states:
        assert list(state) == KEYS
        for leaf in leaves(state):
            assert type(leaf) in (int, float, bool, str, torch.Tensor)


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        assert type(tree) is dict
        assert all(type(key) in (int, str) for key in tree)
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def test_a_saved_state_is_a_copy() -> None:
    run = Run("gradvac")
    run.step(0)
    saved = run.optimizer.core.state_dict()
    before = frozen_copy(saved)
    run.step(1)
    assert frozen_copy(saved) == before
    loaded = run.optimizer.core.state_dict()
    run.optimizer.core.load_state_dict(saved)
    run.step(2)
    assert frozen_copy(saved) == before
    assert frozen_copy(loaded) != before


def test_core_alone_can_be_saved() -> None:
    """As in ``dcp.save({"model": ..., "optim": ..., "balancer": mtl_opt.core})``."""
    run, other = Run("uw"), Run("uw")
    run.step(0)
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.base.load_state_dict(copy.deepcopy(run.optimizer.base.state_dict()))
    other.optimizer.core.load_state_dict(run.optimizer.core.state_dict())
    other.schedule.load_state_dict(run.schedule.state_dict())
    for batch in (1, 2):
        run.step(batch)
        other.step(batch)
    assert run.snapshot() == other.snapshot()


def test_plain_checkpoint_of_the_base_loads() -> None:
    plain = Toy()
    base = torch.optim.AdamW(plain.parameters(), lr=0.02)
    sum(plain.losses()).backward()
    base.step()
    run = Run("uw")
    run.model.load_state_dict(plain.state_dict())
    before = frozen_copy(run.optimizer.core.state_dict())
    run.optimizer.load_state_dict(base.state_dict())
    assert frozen_copy(run.optimizer.base.state_dict()["state"]) == frozen_copy(
        base.state_dict()["state"]
    )
    assert frozen_copy(run.optimizer.core.state_dict()) == before
    run.step(0)


def test_checkpoint_of_ours_loads_into_the_base_without_the_rule() -> None:
    run, plain = Run("uw"), Toy()
    run.step(0)
    state = run.optimizer.state_dict()
    assert set(state) == {"state", "param_groups", "gradbal"}
    base = torch.optim.AdamW(plain.parameters())
    base.load_state_dict({k: v for k, v in state.items() if k != "gradbal"})


def test_state_dict_may_be_given_by_its_name() -> None:
    run = Run("uw")
    run.step(0)
    run.optimizer.load_state_dict(state_dict=run.optimizer.state_dict())


def test_loading_does_not_change_the_dict() -> None:
    run = Run("uw")
    run.step(0)
    state = run.optimizer.state_dict()
    before = frozen_copy(state)
    Run("uw").optimizer.load_state_dict(state)
    assert frozen_copy(state) == before


# ---------------------------------------------------------------------- what does not fit


def refused(run: Run, state: dict[str, Any], sentence: str) -> None:
    before = run.snapshot()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        run.optimizer.load_state_dict(state)
    assert run.snapshot() == before


def test_a_checkpoint_of_another_rule() -> None:
    run, other = Run("uw"), Run("mgda")
    run.step(0)
    other.step(0)
    refused(
        run,
        other.optimizer.state_dict(),
        "Checkpoint: holds the state of the rule MGDA, this optimizer has UW; build it with the "
        "same rule.",
    )


def test_a_checkpoint_of_a_newer_version() -> None:
    run = Run("uw")
    run.step(0)
    state = run.optimizer.state_dict()
    state["gradbal"]["version"] = 99
    refused(
        run,
        state,
        "Checkpoint: written by version 99 of the state, this release reads up to 1; install a "
        "newer gradbal.",
    )


@pytest.mark.parametrize("broken", [{}, {"version": 1}, 3, "text"])
def test_a_checkpoint_that_is_none(broken: Any) -> None:
    run = Run("uw")
    run.step(0)
    refused(
        run,
        {**run.optimizer.state_dict(), "gradbal": broken},
        "Checkpoint: expected what `core.state_dict()` gave, but there is no ",
    )


def test_a_checkpoint_of_a_base_that_does_not_fit() -> None:
    run, other = Run("uw"), Toy()
    run.step(0)
    base = torch.optim.AdamW(
        [{"params": other.trunk.parameters()}, {"params": other.heads.parameters()}]
    )
    state = {**base.state_dict(), "gradbal": run.optimizer.core.state_dict()}
    refused(run, state, "loaded state dict has a different number of parameter groups")


def test_a_rule_with_other_options_loads() -> None:
    """Options are the user's to change between runs."""
    run = Run(make_rule("cagrad", c=0.4))
    run.step(0)
    Run(make_rule("cagrad", c=0.9)).optimizer.load_state_dict(run.optimizer.state_dict())


def test_checkpoint_of_more_tasks_than_were_announced() -> None:
    model = Toy()
    optimizer = wrapped(model, "uw", tasks=["a", "b", "c"])
    optimizer.step(model.named())
    fresh = wrapped(Toy(), "uw")
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.core.contents()["tasks"]["names"] == ["a", "b", "c"]


# Written by version 0.1 before its modules moved: per rule a model, its optimizer after three steps
# of Adam, and the parameters after three more.
OLD = Path(__file__).parent / "data" / "checkpoint_0.1.pt"


@pytest.mark.parametrize("rule", ["ew", "uw", "famo", "gradvac", "moco", "imtl"])
def test_a_checkpoint_of_an_older_commit_goes_on(rule: str) -> None:
    saved = torch.load(OLD, weights_only=True)[rule]
    model = Toy(2, width=3)
    published = PUBLISHED.get(rule, rule)
    optimizer = MTLOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), published)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for batch in range(3, 6):
        optimizer.step(model.named(batch))
    for name, wanted in saved["after"].items():
        torch.testing.assert_close(model.state_dict()[name], wanted, rtol=1e-12, atol=1e-14)


def test_learned_values_of_an_older_commit_go_on_and_moments_begin_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = torch.load(OLD, weights_only=True)["uw"]
    model = Toy(2, width=3)
    optimizer = MTLOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), "uw")
    with caplog.at_level(logging.WARNING, logger="gradbal"):
        optimizer.load_state_dict(saved["optimizer"])
    assert "the learned values go on, and the moments begin anew" in caplog.text
    state = saved["optimizer"]["gradbal"]["state"][0]["groups"]["model"]
    kept = optimizer.core.state["model"]
    assert kept.keys() == {"log_variance"}
    assert torch.equal(kept["log_variance"], state["log_variance"])
    optimizer.step(model.named(3))
