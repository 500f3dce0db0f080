"""The benchmark of AutoMTL, much reduced: its scenes, its random policies, its command."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import automtl, scenes
from benchmarks.automtl import METHODS, NEAR, Cell, Record, size_of
from benchmarks.automtl_report import (
    ALONE,
    CHANCE,
    FOUND,
    RANDOM,
    Results,
    by_skips,
    table,
    verdict,
)
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training.resume import read_records, write_records

SMALL = replace(
    automtl.PRESET,
    pretrain=replace(automtl.PRESET.pretrain, steps=1),
    search=replace(automtl.PRESET.search, steps=4),
    policy_steps=1,
    weight_steps=1,
)
TASKS = scenes.load(0, (1, 1, 1)).tasks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = partial(scenes.load, counts=(32, 16, 16))
    monkeypatch.setattr(automtl, "PROBLEMS", {"scenes": tiny})
    monkeypatch.setattr(automtl, "PRESET", SMALL)


# ---------------------------------------------------------------------- scenes


def test_scenes_have_labels_that_fit_what_is_drawn() -> None:
    data: Problem = scenes.load(1, (60, 20, 20))
    x, y = data.train.x, data.train.y  # type: ignore[attr-defined]  # in memory
    assert x.shape == (60, 3, scenes.SIDE, scenes.SIDE)
    assert {*y["segmentation"].unique().tolist()} == set(range(scenes.SHAPES + 1))
    assert y["depth"].min() > scenes.NEAR - 1e-5
    assert y["depth"].max() < scenes.FAR + 1e-5
    floor = y["segmentation"] == 0
    for rows, here in zip(y["depth"], floor, strict=True):
        whole = rows[here.all(dim=1)].mean(dim=1)  # rows without a shape
        assert (whole.diff() <= 1e-6).all()  # nearer towards the viewer
    assert torch.equal(scenes.load(1, (60, 20, 20)).train.x, x)  # type: ignore[attr-defined]
    assert not torch.equal(scenes.load(2, (60, 20, 20)).train.x, x)  # type: ignore[attr-defined]


def test_the_network_of_scenes_keeps_their_size() -> None:
    data = scenes.load(1, (2, 1, 1))
    z = torch.nn.Sequential(*(stage() for stage in data.stages))(torch.zeros(2, 3, 24, 24))
    assert {t: tuple(head()(z).shape) for t, head in data.heads.items()} == {
        "segmentation": (2, 4, 24, 24),
        "depth": (2, 1, 24, 24),
    }


# ---------------------------------------------------------------------- random policies


@pytest.mark.slow
def test_random_policies_have_the_size_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    data = automtl.PROBLEMS["scenes"](0)
    torch.manual_seed(0)
    model = automtl._supermodel(data, "shared")
    wanted, found = 25_000, []
    for number in range(3):
        cell = Cell("scenes", f"{RANDOM}{number}", "ew", 0, 1, size=wanted)
        network, policy = automtl._random(model, cell)
        assert abs(size_of(network) / wanted - 1) < NEAR
        assert automtl._random(model, cell)[1] == policy
        found.append(policy)
    assert found[0] != found[1] != found[2]
    monkeypatch.setattr(automtl, "TRIES", 10)
    with pytest.raises(RuntimeError, match=r"^no random policy has 10 parameters$"):
        automtl._random(model, replace(cell, size=10))


# ---------------------------------------------------------------------- tables


def record(method: str, rule: str, seed: int, miou: float, error: float, size: int) -> Record:
    """Return a record with these figures, of one task if that stands alone."""
    figures = {"segmentation": {"miou": miou}, "depth": {"abs_err": error}}
    if method == ALONE:
        figures = {rule: figures[rule]}
    policy = {"depth": [0, 1]} if method.startswith((FOUND, RANDOM)) else {}
    return Record(
        Cell("scenes", method, rule, seed, 1), 1, {}, figures, size, 5 * size, policy, 3.0
    )


def results(chance: float) -> Results:
    """Return figures of two seeds: mIoU 0.5 alone, 0.6 found, and these by chance."""
    records = []
    for seed, noise in enumerate((0.0, 0.002)):
        records += [record(ALONE, task, seed, 0.5, 0.2, 100) for task in TASKS]
        records.append(record(FOUND, "ew", seed, 0.6, 0.2, 150))
        records += [
            record(f"{RANDOM}{n}", "ew", seed, chance + noise + off, 0.2, 150)
            for n, off in enumerate((-0.01, 0.01))
        ]
        records.append(record(FOUND, "upgrad", seed, 0.1, 0.2, 150))
    return Results(records, "scenes", "ew", TASKS)


def test_delta_m_is_against_the_tasks_alone_and_chance_is_a_mean() -> None:
    some = results(0.55)
    assert some.deltas(FOUND) == pytest.approx({0: -10.0, 1: -10.0})
    assert some.deltas(CHANCE) == pytest.approx({0: -5.0, 1: -5.2})
    assert some.figures(CHANCE, "segmentation") == pytest.approx({0: 0.55, 1: 0.552})
    assert some.cost(ALONE, "parameters") == 200
    assert some.cost(CHANCE, "operations") == 750
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(some).splitlines()]
    assert [line[0] for line in lines[2:]] == ["one for each task", FOUND, CHANCE]
    assert lines[4][-1] == "**-4.9 ± 1.3**"  # Student's, of -5.0 and -4.8


@pytest.mark.parametrize(
    ("chance", "words"),
    [
        (0.55, "AutoMTL beats random policies of equal size: -4.9 ± 1.3"),
        (0.65, "AutoMTL is worse than random policies of equal size: +5.1 ± 1.3"),
        (0.6, "AutoMTL and random policies of equal size do not differ beyond the noise: +0.1"),
    ],
)
def test_the_verdict_says_what_the_interval_says(chance: float, words: str) -> None:
    assert verdict(results(chance)).startswith(words)


def test_skips_are_told_apart() -> None:
    some = results(0.55)
    many = some.found[CHANCE][0][0]
    some.found[CHANCE][0][0] = replace(many, policy={"depth": [2, 2], "segmentation": [2, 0]})
    assert by_skips(some) == (
        "Looked at afterwards, so no test: AutoMTL's Delta_m less that of a random policy is -4.5 "
        "over 3 policies that skip at most 2 times more than it, and -6.0 over 1 that skip more "
        "often."
    )


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_trains_all_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "some.jsonl"
    words = ["--rules", "ew", "--seeds", "0", "1", "--epochs", "1", "--policies", "1"]
    words += ["--out", str(out)]
    monkeypatch.setattr(automtl, "TRIES", 200_000)
    assert automtl.main(words) == 0
    page = out.with_suffix(".md").read_text()
    names = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line[:1] == "|"]
    assert [name for name in METHODS if name not in names] == []
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    lines = out.read_text().splitlines()
    assert len(lines) == 2 * (len(TASKS) + len(METHODS) + 1)
    monkeypatch.setattr(automtl, "train", None)  # nothing is left to do
    assert automtl.main(words) == 0
    assert out.with_suffix(".md").read_text() == page
    capsys.readouterr()


@pytest.mark.slow
def test_a_search_is_the_same_again() -> None:
    against = (0.5, 0.2)
    cell = Cell("scenes", FOUND, "upgrad", 0, 1, against)
    first, second = automtl.train(cell), automtl.train(cell)
    assert first == replace(second, search_s=first.search_s)
    assert Record.read({**vars(first), "cell": vars(cell)}) == first


def test_committed_records_are_read_and_written_alike(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "docs" / "results" / "automtl.jsonl"
    records = read_records(path, Record)
    assert len(records) == 165
    write_records(tmp_path / "again.jsonl", records)
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_one_seed_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        automtl.parse(["--seeds", "3", "3"])
    assert "an interval needs two different ones" in capsys.readouterr().err
