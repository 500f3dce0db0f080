"""The benchmark of rules and architectures, much reduced: cells, resuming, the table."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import cells as training
from benchmarks import combinations
from benchmarks.cells import Cell, Record, cells_of, train
from benchmarks.problems import PROBLEMS, problem
from benchmarks.tables import render
from gradbal import rule_names
from gradbal.lab.models.architectures import ARCHITECTURES, build
from gradbal.lab.training.loop import ALONE
from gradbal.lab.training.resume import read_records

TASKS = ["diagnosis", "texture", "smoothness", "symmetry"]
CELLS = cells_of(["tumours"], ["HPS", "DSelectK"], ["dwa", "upgrad"], [0], 2)


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Cell, Record]:
    """Train all cells in one run."""
    path = tmp_path_factory.mktemp("whole") / "cells.jsonl"
    records, failures = combinations.run(CELLS, path, quiet=True)
    assert failures == {}
    return records


def table(records: dict[Cell, Record]) -> str:
    return render(CELLS, records, timed=False)


def timeless(records: dict[Cell, Record]) -> list[Record]:
    return [replace(records[cell], step_ms=0) for cell in CELLS]


def killing(after: int) -> Callable[[Cell], Record]:
    """Return what trains some cells and is then killed."""
    left = iter(range(after))

    def train_or_die(cell: Cell) -> Record:
        if next(left, None) is None:
            raise KilledError
        return train(cell)

    return train_or_die


# ---------------------------------------------------------------------- cells


def test_what_there_is_to_combine() -> None:
    assert len(combinations.RULES) * len(ARCHITECTURES) == 120
    assert set(combinations.RULES) <= set(rule_names())
    options = combinations.parse([])
    assert list(options.problems) == list(PROBLEMS)
    pairs = [(cell.arch, cell.rule) for cell in CELLS]
    assert pairs == [(ALONE, task) for task in TASKS] + [
        (arch, rule) for arch in ("HPS", "DSelectK") for rule in ("dwa", "upgrad")
    ]


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_hold_out_what_they_score_on(name: str) -> None:
    data: Any = PROBLEMS[name](0)  # in memory
    rows = [{tuple(x.flatten().tolist()) for x in split.x} for split in (data.train, data.test)]
    assert not rows[0] & rows[1]
    assert len(data.validation) == 0
    assert len(data.train.x) % data.batch != 1  # norms over a batch need two examples
    for task in data.tasks:
        assert len(data.train.y[task]) == len(data.train.x)
        assert len(data.test.y[task]) == len(data.test.x)
        if data.tasks[task].select == "mse":
            y = data.train.y[task].double()
            torch.testing.assert_close(y.mean(), torch.zeros_like(y.mean()), atol=1e-6, rtol=0)
            torch.testing.assert_close(y.var(), torch.ones_like(y.var()), atol=1e-2, rtol=0)
    assert not torch.equal(data.train.x, PROBLEMS[name](1).train.x)


def test_cells_train(whole: dict[Cell, Record]) -> None:
    assert list(whole) == CELLS
    for cell, record in whole.items():
        assert list(record.scores) == ([cell.rule] if cell.arch == ALONE else TASKS)
        assert record.loss_after < record.loss_before
        assert record.unmoved == ()
        assert record.params > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_fits_both_problems(arch: str) -> None:
    for name in PROBLEMS:
        data: Any = problem(name, 0)  # in memory
        model = build(arch, data.stages, {task: make() for task, make in data.heads.items()})
        outputs = model.initialize(data.train.x[:2])(data.train.x[:4])
        for task, output in outputs.items():
            loss = data.tasks[task].loss(output, data.train.y[task][:4])
            assert loss > 0  # as GLS wants it
            assert output.shape[0] == 4


@pytest.mark.slow
def test_a_cell_is_the_same_again_and_draws_nothing_from_the_global_generator() -> None:
    cell = Cell("tumours", "LearningToBranch", "rlw", 0, 1)
    before = torch.get_rng_state()
    again = [replace(train(cell), step_ms=0) for _ in range(2)]
    assert again[0] == again[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert replace(train(replace(cell, seed=1)), step_ms=0).scores != again[0].scores


# ---------------------------------------------------------------------- resuming


def test_a_killed_run_goes_on_and_gives_the_same_table(
    whole: dict[Cell, Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cells.jsonl"
    monkeypatch.setattr(combinations, "train", killing(after=3))
    with pytest.raises(KilledError):
        combinations.run(CELLS, path, quiet=True)
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:  # killed in the middle of a line
        file.write(json.dumps({"cell": {"problem": "tumours"}})[:-3])
    monkeypatch.setattr(combinations, "train", killing(after=len(CELLS) - 3))
    records, failures = combinations.run(CELLS, path, quiet=True)
    assert failures == {}
    assert timeless(records) == timeless(whole)
    assert table(records) == table(whole)
    assert read_records(path, Record) == records
    monkeypatch.setattr(combinations, "train", killing(after=0))
    assert combinations.run(CELLS, path, quiet=True)[0] == records


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text("nonsense\n{}\n")
    with pytest.raises(ValueError, match=r"line 1 is no record; delete the line\.$"):
        read_records(path, Record)


# ---------------------------------------------------------------------- failures


def idle(*_: object) -> tuple[list[float], list[float]]:
    return [1.0] * 20, [0.0] * 20


def test_cells_that_do_not_train_or_raise_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "_fit", idle)
    command = "--problems tumours --archs HPS --rules ew --epochs 1 --out"
    arguments = [*command.split(), str(tmp_path / "cells.jsonl")]
    assert combinations.main(arguments) == 1
    told = capsys.readouterr()
    assert "FAILED tumours HPS ew seed 0: the summed loss did not fall (1 to 1)" in told.err
    assert "heads.texture.1.weight" in told.err
    assert "0 of 5 cells train" in told.err
    assert told.out.count("| NO |") == 2  # the tasks alone, and HPS
    assert told.out.rstrip("\n") == (tmp_path / "cells.md").read_text().rstrip("\n")

    monkeypatch.setattr(training, "_fit", lambda *_: 1 / 0)
    arguments[-1] = str(tmp_path / "others.jsonl")
    assert combinations.main(arguments) == 1
    assert "FAILED tumours HPS ew seed 0: ZeroDivisionError: " in capsys.readouterr().err
    assert read_records(tmp_path / "others.jsonl", Record) == {}


# ---------------------------------------------------------------------- the table


def rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| "):
            yield line.strip("| ").split(" | ")


def test_the_table_has_a_row_for_every_combination(whole: dict[Cell, Record]) -> None:
    found = [row[:2] for row in rows(table(whole)) if row[-1] == "yes"]
    assert found == [
        [ALONE, ""],
        *([arch, rule] for arch in ("HPS", "DSelectK") for rule in ("dwa", "upgrad")),
    ]
    less = {cell: whole[cell] for cell in CELLS if cell.rule != "dwa"}
    assert [row[:3] for row in rows(table(less)) if row[-1] == "NO"] == [
        [arch, "dwa", "-"] for arch in ("HPS", "DSelectK")
    ]


def test_medians_and_differences_over_seeds() -> None:
    seeds = {0: 0.0, 1: 0.1}
    every = cells_of(["tumours"], ["HPS"], ["ew", "rlw"], list(seeds), 3)
    records = {}
    for cell in every:
        score = 1.0 if cell.arch == ALONE else 1.1 + seeds[cell.seed] + 0.2 * (cell.rule == "rlw")
        scores = {cell.rule: 1.0} if cell.arch == ALONE else dict.fromkeys(TASKS, score)
        scores = {task: 2 - s if task == "diagnosis" else s for task, s in scores.items()}
        records[cell] = Record(cell, scores, 10, 1.0, 2.0, 1.0, ())
    lines = list(rows(render(every, records)))
    assert ["ew", "15.0 ± 7.1", "15.0 ± 7.1", "0.0 ± 0.0"] in lines
    assert ["rlw", "35.0 ± 7.1", "35.0 ± 7.1", "20.0 ± 0.0"] in lines
    assert ["median", "25.0 ± 7.1", "25.0 ± 7.1"] in [line[:3] for line in lines]
