"""The driver of AutoMTL: what it ends with, and that an interruption changes nothing."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from arch_zoo import AutoMTL, MultiTaskModel
from arch_zoo.automtl import Lowered, Temperature
from arch_zoo.automtl.presets import Preset, Recipe, Stage
from arch_zoo.automtl.record import Data, Record
from arch_zoo.automtl.search import search
from arch_zoo.automtl.stages import Batch
from gradbal import MTLOptimizer, engines

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict.fromkeys("ab", nn.functional.mse_loss)
PRESET = Preset(
    pretrain=Stage(steps=5, recipe=Recipe(lr=0.01)),
    search=Stage(steps=10, recipe=Recipe(kind="sgd", lr=0.01, momentum=0.9)),
    posttrain=Stage(steps=7, recipe=Recipe(lr=0.01, drops=(4,), gamma=0.1)),
    policy=Recipe(lr=0.3),
    policy_steps=2,
    weight_steps=2,
    policy_weight=0.1,
)
QUICK = replace(PRESET, pretrain=replace(PRESET.pretrain, steps=2))
UNTRAINED = replace(QUICK, posttrain=replace(PRESET.posttrain, steps=0))


class Interrupt(Exception):
    """Stands for a kill: nothing is written after it."""


def supermodel() -> AutoMTL:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)]
    backbone = nn.Sequential(*layers, nn.Conv2d(4, 6, 3, 2, 1), nn.Flatten())
    heads = {task: nn.Linear(6 * 4, 2) for task in "ab"}
    return AutoMTL(backbone, heads, torch.zeros(2, 3, 6, 6), tau=Temperature(2.0, 0.5, 2))


def batches(seed: int, n: int, epoch: int) -> Iterator[Batch]:
    generator = Generator().manual_seed(100 * seed + epoch)
    for _ in range(n):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        yield x + 0 * torch.rand(()), {"a": x[:, :2, 0, 0], "b": x[:, 0, :2, 3]}  # draws globally


DATA = Data(
    train=partial(batches, 0, 3), weights=partial(batches, 1, 2), policy=partial(batches, 2, 3)
)


def figure(model: MultiTaskModel) -> float:
    assert not model.training
    return -sum(
        LOSSES[task](y, targets[task]).item()
        for x, targets in batches(9, 2, 0)
        for task, y in model(x).items()
    )


def balance(rule: str, base: torch.optim.Optimizer) -> MTLOptimizer:
    return MTLOptimizer(base, rule, engine=engines.Sequential())


def run(model: AutoMTL | None = None, rule: str = "ew", **given: Any) -> tuple[Lowered, Record]:
    arguments = {"data": DATA, "losses": LOSSES, "validate": figure, "preset": PRESET, "every": 3}
    arguments |= {"balance": partial(balance, rule), "progress": False, **given}
    return search(supermodel() if model is None else model, **arguments)


def same(ours: tuple[Lowered, Record], theirs: tuple[Lowered, Record]) -> bool:
    states = [model.state_dict() for model, _ in (ours, theirs)]
    return (
        ours[1] == theirs[1]
        and states[0].keys() == states[1].keys()
        and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    )


# ---------------------------------------------------------------------- the whole


def test_it_ends_with_a_trained_network_and_what_was_seen() -> None:
    model, before = supermodel(), torch.get_rng_state()
    lowered, record = run(model, progress=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(lowered, Lowered)
    assert not lowered.training
    assert {task: len(row) for task, row in record.policy.items()} == {"a": 2, "b": 2}
    likeliest = model.policy.argmax()
    assert record.policy == {task: rows.argmax(1).tolist() for task, rows in likeliest.items()}
    assert len(record.course) == 4  # after 3, 6, 9 and 10 steps
    for look in record.course:
        assert all(sum(shares) == pytest.approx(1) for shares in look.values())
    assert len(record.curve) == 3
    assert max(record.curve) == figure(lowered)
    assert record.best in (3, 6, 7)
    assert record.candidates == []
    assert model.policy.tau.steps == 6


def test_every_stage_has_its_steps_rates_and_batches() -> None:
    seen: list[tuple[str, float, int]] = []

    class Told(MTLOptimizer):
        def step(self, losses: Any = None, *more: Any, **given: Any) -> Any:  # type: ignore[override]
            seen.append((type(self.base).__name__, self.param_groups[0]["lr"], len(more)))
            return super().step(losses, *more, **given)

    def modo(base: torch.optim.Optimizer) -> MTLOptimizer:
        return Told(base, "modo")

    run(balance=modo, batches=2)
    pretrain, learn, posttrain = [("Adam", 0.01, 1)], [("SGD", 0.01, 1)], [("Adam", 1e-3, 1)]
    assert seen == [*(5 * pretrain), *(4 * learn), *(4 * pretrain), *(3 * posttrain)]


def test_losses_are_weighted_as_the_stage_says() -> None:
    stage = replace(PRESET.posttrain, loss_weights={"a": 0.0})
    lowered, _ = run(preset=replace(PRESET, posttrain=stage))
    assert torch.equal(lowered.heads["a"].weight, supermodel().heads["a"].weight)
    assert not torch.equal(lowered.heads["b"].weight, supermodel().heads["b"].weight)


# ---------------------------------------------------------------------- choices


def test_the_best_of_several_policies_on_validation_is_taken() -> None:
    def size(model: MultiTaskModel) -> float:
        return -float(sum(parameter.numel() for parameter in model.parameters()))

    lowered, record = run(samples=6, validate=size, preset=UNTRAINED)
    assert len(set(record.candidates)) > 1
    assert size(lowered) == max(record.candidates)


def test_a_figure_that_is_no_number_is_worse_than_any() -> None:
    figures = iter([math.nan, -5.0, math.nan, math.nan, -7.0, -6.0])
    _, record = run(samples=3, validate=lambda model: next(figures))
    assert record.best == 7
    figures = iter(3 * [math.nan])
    assert run(validate=lambda model: next(figures))[1].best == 3


def test_weights_are_fresh_or_inherited() -> None:
    start = supermodel().state_dict()
    for inherit in (False, True):
        model = supermodel()
        lowered, record = run(model, preset=UNTRAINED, inherit=inherit)
        assert record.inherited == inherit
        source = model.state_dict() if inherit else start
        known = {name: p for name, p in lowered.named_parameters() if name in source}
        assert len(known) > 4  # heads, and convolutions
        assert all(torch.equal(parameter, source[name]) for name, parameter in known.items())
        fresh = torch.equal(lowered.heads["a"].weight, start["heads.a.weight"])
        assert fresh is not inherit


def test_validation_chooses_the_weights_that_are_returned() -> None:
    states: list[dict[str, Tensor]] = []

    def second(model: MultiTaskModel) -> float:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return float(len(states) == 2)

    lowered, record = run(validate=second)
    assert record.best == 6
    assert all(torch.equal(tensor, states[1][n]) for n, tensor in lowered.state_dict().items())


# ---------------------------------------------------------------------- interruptions


class Fuse:
    """Counts batches and validations of a run, and blows at one of them."""

    def __init__(self, at: tuple[str, int] | None = None) -> None:
        self.at, self.counts = at, dict.fromkeys(("train", "weights", "policy", "figure"), 0)

    def count(self, what: str) -> None:
        self.counts[what] += 1
        if (what, self.counts[what]) == self.at:
            raise Interrupt

    def loader(self, what: str) -> Callable[[int], Iterator[Batch]]:
        def watched(epoch: int) -> Iterator[Batch]:
            for batch in getattr(DATA, what)(epoch):
                self.count(what)
                yield batch

        return watched

    def run(self, **given: Any) -> tuple[Lowered, Record]:
        def watched(model: MultiTaskModel) -> float:
            self.count("figure")
            return figure(model)

        names = ("train", "weights", "policy")
        data = Data(**{name: self.loader(name) for name in names})
        return run(data=data, validate=watched, **given)


PLACES = {
    "in the first step": ("train", 1),
    "while it is pre-trained": ("train", 5),
    "in a turn of the policy": ("policy", 5),
    "in a turn of the weights": ("weights", 4),
    "while policies are compared": ("figure", 2),
    "while it is post-trained": ("train", 17),
    "in the last validation": ("figure", 6),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(place: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rule": "upgrad", "samples": 3, "inherit": "post" in place}
    whole = run(**given)
    given["checkpoint"] = tmp_path / "run" / "search.pt"
    with pytest.raises(Interrupt):
        Fuse(PLACES[place]).run(**given)
    torch.rand(3)  # another process has other random numbers
    assert same(run(**given), whole)
    assert [file.name for file in given["checkpoint"].parent.iterdir()] == ["search.pt"]


@pytest.mark.parametrize("rule", ["famo", "rlw"])
def test_a_run_may_be_killed_again_and_again(rule: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"rule": rule, "samples": 2, "checkpoint": tmp_path / "search.pt"}
    for place in PLACES.values():
        fuse = Fuse(place)
        try:
            fuse.run(every=1, **given)
        except Interrupt:
            continue
    assert same(run(every=1, **given), run(every=1, **{**given, "checkpoint": None}))


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    given = {"checkpoint": tmp_path / "search.pt"}
    whole, fuse = run(**given), Fuse()
    assert same(fuse.run(**given), whole)
    assert set(fuse.counts.values()) <= {0, 1}


def test_a_kill_while_writing_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, save, calls = tmp_path / "search.pt", torch.save, iter(range(100))

    def torn(contents: Any, file: Path) -> None:
        if next(calls) == 3:
            file.write_bytes(b"half a file")
            raise Interrupt
        save(contents, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(Interrupt):
            run(checkpoint=path)
    assert same(run(checkpoint=path), run())


# ---------------------------------------------------------------------- errors


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "search.pt"
    run(checkpoint=path, preset=QUICK)
    start = re.escape("AutoMTL: `checkpoint` must be of this run, Preset(")
    end = re.escape("seed 0. Give another file, or delete this one.")
    with pytest.raises(ValueError, match=f"^{start}.*seed 1; .*search.pt' is of .*{end}$"):
        run(checkpoint=path, preset=QUICK, seed=1)


def test_a_pass_without_batches_is_refused() -> None:
    whole = re.escape("AutoMTL: `data` must have batches, got none in pass 0.")
    with pytest.raises(ValueError, match=f"^{whole}$"):
        run(data=replace(DATA, policy=lambda epoch: []))
