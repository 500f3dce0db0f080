"""The benchmark of AutoMTL, much reduced: its scenes, its policies, its tables, its command."""

import sys
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import automtl, scenes
from benchmarks import automtl_controls as controls
from benchmarks import automtl_controls_report as controls_report
from benchmarks import automtl_networks as networks
from benchmarks.automtl_networks import GIVEN, METHODS, NEAR, WIDE, Cell, Record, size_of
from benchmarks.automtl_report import (
    CHANCE,
    FOUND,
    RANDOM,
    Results,
    by_skips,
    table,
    verdict,
)
from gradbal.lab.problems.problem import Problem
from gradbal.lab.training import loop as training
from gradbal.lab.training.loop import ALONE
from gradbal.lab.training.resume import read_records, write_records

SMALL = replace(
    networks.PRESET,
    pretrain=replace(networks.PRESET.pretrain, steps=1),
    search=replace(networks.PRESET.search, steps=4),
    policy_steps=1,
    weight_steps=1,
)
TASKS = scenes.load(0, (1, 1, 1)).tasks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = partial(scenes.load, counts=(32, 16, 16))
    monkeypatch.setitem(networks.PROBLEMS, "scenes", tiny)
    monkeypatch.setattr(networks, "PRESET", SMALL)


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
    data = networks.PROBLEMS["scenes"](0)
    torch.manual_seed(0)
    model = networks.supermodel(data)
    wanted, found = 25_000, []
    for number in range(3):
        cell = Cell("scenes", f"{RANDOM}{number}", "ew", 0, 1, size=wanted)
        network, policy = networks.random_network(model, cell)
        assert abs(size_of(network) / wanted - 1) < NEAR
        assert networks.random_network(model, cell)[1] == policy
        found.append(policy)
    assert found[0] != found[1] != found[2]
    monkeypatch.setattr(networks, "TRIES", 10)
    with pytest.raises(RuntimeError, match=r"^no random policy has 10 parameters$"):
        networks.random_network(model, replace(cell, size=10))


# ---------------------------------------------------------------------- controls

FOUND_ROWS = ((0, 0, 0, 0, 2, 1, 1), (0, 0, 0, 0, 0, 0, 1))


def test_what_one_task_alone_calls_shared_is_its_copy() -> None:
    assert controls.effective(FOUND_ROWS) == ((0, 0, 0, 0, 2, 1, 1), (0, 0, 0, 0, 1, 1, 1))
    three = ((0, 0), (0, 1), (1, 2))
    assert controls.effective(three) == ((0, 1), (0, 1), (1, 2))


def test_controls_are_splits_and_policies_that_keep_what_was_found() -> None:
    size = 24_000
    found = controls.controls("scenes", 0, FOUND_ROWS, size, draws=1)
    assert found["split at 0"] == ((1,) * 7,) * 2
    assert found["split at 5"] == ((0, 0, 0, 0, 0, 1, 1),) * 2
    assert found["split at 7"] == ((0,) * 7,) * 2
    model = networks.supermodel(networks.PROBLEMS["scenes"](0))
    shuffled, skipping = found["shuffled 1"], found["equal skips 1"]
    assert [*map(sorted, shuffled)] == [*map(sorted, FOUND_ROWS)]
    assert [row.count(2) for row in skipping] == [1, 0]
    assert abs(size_of(networks.given(model, skipping)[0]) / size - 1) < NEAR
    assert len(found) == 8 + 2


def test_a_policy_is_trained_once_whoever_found_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(cell: Cell) -> Record:
        trained.append(cell.method)
        return Record(cell, 1, {}, {}, 1, 1)

    monkeypatch.setattr(controls, "train", train)
    monkeypatch.setattr(controls, "_trained", lru_cache(train))
    first = Cell("scenes", FOUND, "ew", 0, 1, policy=FOUND_ROWS)
    second = replace(first, method="split at 5")
    assert [controls.train_once(cell).cell for cell in (first, second)] == [first, second]
    assert controls.train_once(replace(first, method=WIDE, policy=())).cell.method == WIDE
    assert trained == [GIVEN, WIDE]


def test_a_wide_network_has_the_size() -> None:
    wide = networks.wide(Cell("scenes", WIDE, "ew", 0, 1, size=23_000))
    assert abs(size_of(wide) / 23_000 - 1) < 0.05


def test_permuted_labels_are_the_same_ones_elsewhere() -> None:
    train: Any = networks.PROBLEMS["scenes"](0).train  # in memory
    moved = networks.permuted(train, torch.Generator().manual_seed(0))
    assert torch.equal(moved.x, train.x)
    orders = []
    for task, labels in train.y.items():
        same = (moved.y[task].flatten(1)[:, None] == labels.flatten(1)).all(dim=2)
        assert (same.sum(dim=0) > 0).all()
        orders.append(same.float().argmax(dim=1))
    assert not torch.equal(*orders)


def test_affinities_are_cosines_of_the_gradients_of_tasks() -> None:
    data: Any = networks.PROBLEMS["scenes"](0)  # in memory
    torch.manual_seed(0)
    model = networks.supermodel(data)
    losses = {name: task.loss for name, task in data.tasks.items()}
    inputs, targets = next(training.epoch_of(data.train, 16, 0, 0))
    everything = networks.as_choices(model, networks.everything_shared(model))
    outputs = model.decode(model.encode(inputs, choices=everything))
    weight = model.network.get_parameter("_0_0.shared.weight")
    flat = [
        torch.autograd.grad(losses[t](y, targets[t]), weight, retain_graph=True)[0].flatten()
        for t, y in outputs.items()
    ]
    cell = Cell("scenes", networks.AFFINITY, "ew", 0, 0)
    found = networks.affinities(model, data.train, losses, 16, cell)
    for rows in found.values():  # two tasks agree alike; one step was taken, so one look
        assert rows.shape == (7,)
        cosine = torch.cosine_similarity(flat[0], flat[1], dim=0)
        torch.testing.assert_close(rows[0], cosine)


def trained(
    method: str, seed: int, miou: float, rows: networks.Rows = (), size: int = 100
) -> Record:
    """Return the record of a network of a policy, alike on validation and test examples."""
    cell = Cell("scenes", method, "ew", seed, 1, (0.5, 0.2), policy=rows)
    figures = {"segmentation": {"miou": miou}, "depth": {"abs_err": 0.2}}
    return Record(cell, 1, figures, figures, size, 500)


def study(found: float, split: float) -> controls_report.Study:
    """Return the study of two seeds in which searches and the best split have these mIoU."""
    records = []
    for seed, noise in enumerate((0.0, 0.002)):
        records += [record(ALONE, task, seed, 0.5, 0.2, 100) for task in TASKS]
        records.append(trained(WIDE, seed, 0.5))
        for method in controls.TRIED:
            last = ((0,) * 6 + (1,),) * 2
            rows: networks.Rows = last if method == networks.COSTS else FOUND_ROWS
            policy = {task: [*row] for task, row in zip(TASKS, rows, strict=True)}
            cell = Cell("scenes", method, "ew", seed, 0)
            records.append(Record(cell, 0, {}, {}, 100, 500, policy, 2.0))
            records.append(trained(method, seed, found + noise, controls.effective(rows)))
        for n in range(8):
            rows = ((0,) * n + (1,) * (7 - n),) * 2
            records.append(
                trained(f"split at {n}", seed, split - 0.01 * abs(n - 6), rows, 170 - 10 * n)
            )
        drawn = ((1, 1, 1, 1, 0, 0, 2), (1, 1, 1, 1, 0, 0, 1))
        records += [trained(f"{start}1", seed, 0.5, drawn) for start in controls_report.GROUPS]
    return controls_report.Study(records, "scenes", "ew", TASKS)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (0.6, "**Beyond the noise, AutoMTL and AutoMTL, expected parameters and AutoMTL, affinity"),
        (
            0.5,
            "**No search beats a split at most as large, chosen on validation, beyond the noise.**",
        ),
    ],
)
def test_the_controls_say_whether_a_search_beats_a_split(found: float, words: str) -> None:
    some = study(found=found, split=0.55)
    assert controls_report.verdict(some).startswith(words)
    assert "In 0 of 2 seeds AutoMTL's network is itself a split" in controls_report.verdict(some)
    assert "in 2 the search finds the same network from permuted" in controls_report.verdict(some)
    for name, split in ((controls_report.CHOSEN, 6), (controls_report.FITTING, 7)):
        chosen = some.results.found[name].values()
        assert [records[0].cell.method for records in chosen] == [f"split at {split}"] * 2


def test_sharing_counts_where_another_task_shares() -> None:
    some = study(found=0.5, split=0.5)
    assert some.nominal(FOUND) == pytest.approx((4 + 6) / 14)
    assert some.sharing(FOUND) == pytest.approx(8 / 14)
    lines = controls_report.policies(some).splitlines()
    assert "`ssss-cc / ssssccc` | `ssss-cc / ssssccc`" in lines[2]
    assert "| AutoMTL, expected parameters | split at 6 | split at 6 | 86 %" in str(lines)
    rows = controls.effective(FOUND_ROWS)
    assert controls_report.alike(rows, ((0, 0, 1, 1, 0, 0, 1),) * 2) == 2 / 6
    assert controls_report.alike(((1,),) * 2, ((2,),) * 2) == 1
    stability = controls_report.stability(some)
    assert "| AutoMTL on another seed | 1.00 " in stability
    assert "| AutoMTL, expected parameters | 0.67 " in stability


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


def test_the_verdict_says_who_skips_how_much() -> None:
    some = results(0.55)
    some.found[CHANCE][0][0].policy["depth"][:] = [2, 1]
    assert verdict(some).endswith("random policies skip 12 % and AutoMTL 0 %.")


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
    words = ["--problems", "scenes", "--rules", "ew", "--seeds", "0", "1", "--epochs", "1"]
    words += ["--policies", "1", "--out", str(out)]
    monkeypatch.setattr(networks, "TRIES", 200_000)
    assert automtl.main(words) == 0
    page = out.with_suffix(".md").read_text()
    names = [line.split(" | ")[0].strip("| ") for line in page.splitlines() if line[:1] == "|"]
    assert [name for name in METHODS if name not in names] == []
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    lines = out.read_text().splitlines()
    assert len(lines) == 2 * (len(TASKS) + len(METHODS) + 1)
    parts, _, write = automtl.CONTEST
    monkeypatch.setattr(automtl, "CONTEST", (parts, None, write))  # nothing is left to do
    assert automtl.main(words) == 0
    assert out.with_suffix(".md").read_text() == page
    capsys.readouterr()


@pytest.mark.slow
def test_the_controls_are_trained_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "some.jsonl"
    words = ["--controls", "--problems", "scenes", "--rules", "ew", "--seeds", "0", "1"]
    words += ["--epochs", "1", "--policies", "1", "--out", str(out)]
    assert automtl.main(words) == 0
    page = out.with_suffix(".md").read_text()
    for method in (*controls.TRIED, WIDE, "split at 7", *controls_report.GROUPS.values()):
        assert f"\n| {method} |" in page
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert len(out.read_text().splitlines()) == 2 * (2 + 2 * 7 + 1 + 8 + 2)
    parts, _, write = automtl.CONTROLS
    monkeypatch.setattr(automtl, "CONTROLS", (parts, None, write))  # nothing is left to do
    assert automtl.main(words) == 0
    assert out.with_suffix(".md").read_text() == page
    capsys.readouterr()


@pytest.mark.slow
def test_a_search_is_the_same_again() -> None:
    against = (0.5, 0.2)
    cell = Cell("scenes", FOUND, "upgrad", 0, 1, against)
    first, second = networks.train(cell), networks.train(cell)
    assert first == replace(second, search_s=first.search_s)
    assert Record.read({**vars(first), "cell": vars(cell)}) == first


@pytest.mark.parametrize(("name", "lines"), [("automtl", 165), ("automtl_controls", 145)])
def test_committed_records_are_read_and_written_alike(
    name: str, lines: int, tmp_path: Path
) -> None:
    path = Path(__file__).parents[2] / "docs" / "results" / f"{name}.jsonl"
    records = read_records(path, Record)
    assert len(records) == lines
    write_records(tmp_path / "again.jsonl", records)
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_one_seed_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        automtl.parse(["--seeds", "3", "3"])
    assert "an interval needs two different ones" in capsys.readouterr().err
