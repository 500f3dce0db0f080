"""The benchmark of cheap modes, much reduced: its data, its intervals, its cells, its command."""

import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

sys.path.append(str(Path(__file__).parents[2]))
from arch_zoo import HPS
from benchmarks import cheap_modes
from benchmarks.cheap_modes import Cell, Record, choose, train
from benchmarks.frontier import EXACT, PLAIN, Point, frontier, table
from benchmarks.problems import CLASS, NUMBER, PROBLEMS
from gradbal.jacobian.engines import Representation
from gradbal.lab.problems import mulan
from gradbal.lab.training.intervals import Interval
from gradbal.lab.training.loop import ALONE

KNOWN = {"tumours": cheap_modes.TUMOURS, "digits": cheap_modes.DIGITS}
CELL = Cell("tumours", "upgrad", EXACT, seed=0, steps=2, lr=1e-3)


def arff(path: Path, rows: list[list[float]]) -> Path:
    """Write a tiny file with four columns."""
    head = [f"@attribute c{number} numeric" for number in range(4)]
    lines = ["@relation tiny", *head, "@data", *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def rows() -> list[list[float]]:
    """Make one constant column, two that vary, and one that counts the rows."""
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(72, 2, generator=generator).tolist()
    return [[7, *some, number] for number, some in enumerate(columns)]


# ---------------------------------------------------------------------- data


def test_validation_examples_are_training_examples(tmp_path: Path, rows: list[list[float]]) -> None:
    """Without validation there is nothing to choose by, and the test examples are the same."""
    tiny = partial(mulan.load, arff(tmp_path / "tiny.arff", rows), targets=1)
    for make in (PROBLEMS["tumours"], PROBLEMS["digits"], tiny):
        whole, part = (make(seed=0, validation=flag) for flag in (False, True))
        assert len(whole.validation) == 0
        assert len(part.validation) > 0
        assert len(part.test) == len(whole.test)
        if make != PROBLEMS["digits"]:  # which are as many pictures, of fewer digits
            assert len(part.train) + len(part.validation) == len(whole.train)


def test_digits_for_validation_occur_in_no_picture_for_training() -> None:
    whole, part = (PROBLEMS["digits"](0, validation=flag) for flag in (False, True))
    splits: Any = (part.train, whole.test, part.validation)  # in memory
    train, test, chosen_by = (
        {
            tuple(x[0, :, :5].flatten().tolist()) for x in some.x
        }  # where no digit covers the left one
        for some in splits
    )
    assert not train & chosen_by
    assert not test & chosen_by


# ---------------------------------------------------------------------- intervals


def test_intervals_are_those_of_scipy() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, exact = (torch.randn(5, generator=draw, dtype=torch.float64) for _ in range(2))
    found = Interval.of((ours - exact).tolist())
    wanted = stats.ttest_rel(ours.numpy(), exact.numpy()).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(wanted.low)
    assert found.mean + found.half == pytest.approx(wanted.high)
    assert Interval(2.0, 1.0).clear
    assert not Interval(-1.0, 2.0).clear


def test_what_seeds_owe_to_all_modes_is_no_difference() -> None:
    tasks = {"a": NUMBER, "b": CLASS}
    records = []
    for seed, (luck, less) in enumerate([(0.0, 0.19), (0.5, 0.2), (1.0, 0.21)]):
        for rule, mode, score, time in [
            *(("a", ALONE, 1.0, 1.0), ("b", ALONE, 1.0, 1.0)),
            ("ew", EXACT, 1.5 + luck - less, 1.1),
            ("upgrad", EXACT, 1.5 + luck, 3.0 + seed),
            ("upgrad", "cheap", 1.5 + luck, 2.0),
            *[("upgrad", "late", 1.5, 2.0)] * (seed == 0),
        ]:
            scores = {rule: score} if mode == ALONE else {"a": score, "b": 1.0}
            records.append(
                Record(replace(CELL, rule=rule, mode=mode, seed=seed), scores, 1.0, time)
            )
    points = {point.mode: point for point in frontier("upgrad", records, tasks)}
    assert list(points) == [PLAIN, EXACT, "cheap"]  # one seed of "late" is no interval
    assert points[EXACT].time == 4.0
    assert points[EXACT].delta.mean == pytest.approx(50.0)
    assert points[EXACT].delta.half > 50
    assert points[EXACT].less is None
    assert points["cheap"].less == Interval(0.0, 0.0)
    less = points[PLAIN].less
    assert less is not None
    assert less.mean == pytest.approx(-10.0)
    assert less.clear


def test_only_what_leaves_out_zero_is_bold() -> None:
    delta = Interval(3.0, 1.0)
    points = [
        Point(EXACT, 3.0, delta, None),
        Point("worse", 1.5, delta, Interval(2.0, 1.0)),
        Point("like it", 1.5, delta, Interval(0.5, 1.0)),
    ]
    assert table("upgrad", points).splitlines()[2:] == [
        "| exact | 3.00 | 3.0 ± 1.0 |  |",
        "| worse | 1.50 | 3.0 ± 1.0 | **2.0 ± 1.0** |",
        "| like it | 1.50 | 3.0 ± 1.0 | 0.5 ± 1.0 |",
    ]


# ---------------------------------------------------------------------- cells


def test_a_cell_is_the_same_again_and_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    first, second = (train(KNOWN, CELL) for _ in range(2))
    assert replace(first, time=0.0) == replace(second, time=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(first.scores) == list(KNOWN["tumours"](seed=0).tasks)
    assert first.time > 0
    assert first.loss > 0


def test_a_task_alone_is_trained_by_itself() -> None:
    record = train(KNOWN, replace(CELL, rule="texture", mode=ALONE))
    assert list(record.scores) == ["texture"]
    assert record.loss == pytest.approx(record.scores["texture"])


def test_modes_train_in_their_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode that is asked at every step is the exact one; a representation is another thing."""
    cell = replace(CELL, steps=3)
    exact = train(KNOWN, cell)
    for mode, options, same in [
        ("every step", {"update_every": 1}, True),
        ("every 2nd", {"update_every": 2}, False),
        ("representation", {"engine": Representation()}, False),
    ]:
        monkeypatch.setitem(cheap_modes.MODES, mode, lambda model, options=options: options)
        assert (train(KNOWN, replace(cell, mode=mode)).loss == exact.loss) is same


def test_periods_divide_the_steps_that_are_timed_together() -> None:
    modes = [make for name, make in cheap_modes.MODES.items() if name.startswith("every")]
    periods = [
        make(HPS(torch.nn.Identity(), {"a": torch.nn.Identity()}))["update_every"] for make in modes
    ]
    assert len(periods) == 3
    assert all(cheap_modes.BLOCK % period == 0 for period in periods)


def test_the_learning_rate_is_that_of_the_lowest_validation_loss() -> None:
    losses = {0.1: (1.0, 5.0, 6.0), 0.2: (2.0, 4.0, 99.0), 0.3: (5.0, 5.0, 5.0)}
    records = {}
    for seed, lr in product(range(3), losses):
        cell = replace(CELL, rule="ew", seed=seed, lr=lr, validation=True)
        records[cell] = Record(cell, {}, losses[lr][seed], 1.0)
    assert choose(records) == {"tumours": 0.2}


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped(
    tmp_path: Path,
    rows: list[list[float]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = arff(tmp_path / "tiny.arff", rows)
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(cheap_modes, "RATES", (1e-3, 1e-2))
    arguments = (
        f"--seeds 0 1 --steps 2 --modes exact representation --targets 2 --out {out} --mulan"
    )
    assert cheap_modes.main([*arguments.split(), str(path)]) == 0
    text = out.with_suffix(".md").read_text()
    assert "--mulan tiny.arff`" in text
    assert "## digits, 3 tasks, learning rate 0.0" in text
    assert "## tiny, 2 tasks, learning rate 0.0" in text
    for mode in (PLAIN, EXACT, "representation"):
        assert text.count(f"\n| {mode} | ") == 2
    for name in ("digits", "tiny"):
        assert (tmp_path / f"out_{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(out.read_text().splitlines()) == 2 * 2 * 2 + 2 * ((3 + 3) + (2 + 3))

    monkeypatch.setattr(cheap_modes, "train", lambda *_: 1 / 0)
    capsys.readouterr()
    assert cheap_modes.main([*arguments.split(), str(path)]) == 0
    assert out.with_suffix(".md").read_text() == text
    assert cheap_modes.main([*arguments.replace("--steps 2", "--steps 1").split(), str(path)]) == 1
    assert "FAILED digits ew exact seed 0 lr 0.001: ZeroDivisionError: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--seeds 3 3", "--seeds: an interval needs two different ones"),
        ("--targets 3", "--mulan and --targets need each other"),
        ("--mulan none.arff --targets 3", "none.arff: there is no such file."),
        ("--mulan short.arff --targets 1", "short.arff: 20 rows for training; a batch needs 32"),
        ("--rules graddrop", "invalid choice: 'graddrop'"),
        ("--out some.json", "must end in .jsonl, got some.json; the table goes beside"),
        ("--steps 0", "must be >= 1, got 0"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: str,
    told: str,
    rows: list[list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arff(tmp_path / "short.arff", rows[:40])
    with pytest.raises(SystemExit):
        cheap_modes.parse(arguments.split())
    assert told in capsys.readouterr().err
