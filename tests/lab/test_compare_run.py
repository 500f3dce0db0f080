"""Whole comparisons on tiny problems: what is chosen by what, going on after a stop, the table."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from gradbal.cli import main
from gradbal.lab.compare import Report, Settings, contest, cost, run
from gradbal.lab.compare.contest import FIXED, Method, Outcome, Trained, fixed_weights
from gradbal.lab.models.architectures import PLAIN
from gradbal.lab.models.encoders import linear_head, mlp
from gradbal.lab.problems import PROBLEMS
from gradbal.lab.problems.losses import squared_error
from gradbal.lab.problems.metrics import Errors
from gradbal.lab.problems.problem import Apart, Examples, Problem, Task
from gradbal.lab.training.loop import ALONE, Cell, Load, Record, train
from gradbal.lab.training.resume import read_records

HIGHER = {"a": {"mae": False, "rmse": False}, "b": {"mae": False, "rmse": False}}


def two_sums(seed: int) -> Problem:
    """Make two numbers that one layer can find; the second has few labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 3, generator=generator)
    y = {"a": x.sum(dim=1), "b": x[:, 0] - 2 * x[:, 1]}
    y["b"][::4] = torch.nan
    parts = [slice(0, 30), slice(30, 45), slice(45, 60)]
    splits = [Examples(x[part], {task: v[part] for task, v in y.items()}) for part in parts]
    return made("two_sums", *splits)


def made(name: str, *splits: Any) -> Problem:
    task = Task(squared_error, Errors, "mae")
    return Problem(
        name=name,
        tasks={"a": task, "b": task},
        train=splits[0],
        validation=splits[1],
        test=splits[2],
        stages=mlp(3, 4, 4, 4),
        heads=dict.fromkeys(("a", "b"), linear_head(4, 1)),
        batch=10,
    )


def apart(seed: int) -> Problem:
    """Make the same two numbers from inputs of their own."""
    whole = two_sums(seed)
    splits = [getattr(whole, part) for part in ("train", "validation", "test")]
    return made(
        "apart",
        *(
            Apart(
                {
                    t: Examples(s.x[: 9 + 3 * i], {t: s.y[t][: 9 + 3 * i]})
                    for i, t in enumerate("ab")
                }
            )
            for s in splits
        ),
    )


def other_test(seed: int) -> Problem:
    """Make the same with other test examples."""
    data = two_sums(seed)
    assert isinstance(data.test, Examples)
    return replace(data, test=Examples(data.test.x, {t: 5 - y for t, y in data.test.y.items()}))


def settings(out: Path, problem: Any = two_sums, **options: Any) -> Settings:
    few = {"rules": ("upgrad",), "front": 2, "lrs": (0.01, 0.03), "epochs": 3, "patience": 2}
    return Settings(problem=problem, out=out, **{**few, "seeds": 2, "tuned_on": 1, **options})


def cell(problem: str = "two_sums", **changes: Any) -> Cell:
    known: dict[str, Any] = {"arch": PLAIN, "rule": "upgrad", "weights": (), "optimizer": "sgd"}
    known |= {"lr": 0.05, "batch": 10, "epochs": 4, "patience": 4, "seed": 0, "against": (1.0, 1.0)}
    return Cell(problem, **{**known, "device": "cpu", **changes})


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def whole(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run(settings(tmp_path_factory.mktemp("whole")), quiet=True)


def runs(path: Path) -> set[str]:
    return {*(path / "runs.jsonl").read_text().splitlines()}


# ---------------------------------------------------------------------- going on after a stop


class KilledError(BaseException):
    """Stands for the end of the process."""


def killing(after: int) -> Callable[[Load, Cell], Record]:
    """Return what trains some cells and is then killed."""
    left = iter(range(after))

    def train_or_die(load: Load, wanted: Cell) -> Record:
        if next(left, None) is None:
            raise KilledError
        return train(load, wanted)

    return train_or_die


@pytest.mark.slow
@pytest.mark.parametrize("after", [3, 9])
def test_a_stopped_comparison_goes_on_to_the_same_table(
    after: int, whole: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "train", killing(after))
    with pytest.raises(KilledError):
        run(settings(tmp_path), quiet=True)
    assert len(runs(tmp_path)) == after
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"cell": {"problem": "two')  # cut off
    monkeypatch.setattr(contest, "train", train)
    assert run(settings(tmp_path), quiet=True).words(costs=False) == whole.words(costs=False)
    assert runs(tmp_path) == runs(whole.settings.out)
    monkeypatch.setattr(contest, "train", killing(0))  # nothing is left to do
    assert run(settings(tmp_path), quiet=True).numbers() == whole.numbers()


@pytest.mark.slow
def test_killed_for_real(tmp_path: Path) -> None:
    """The command, with two processes, ended without warning in the middle."""
    path = tiny.mulan(tmp_path / "tiny.arff")
    words = ["compare", "mulan", "--path", str(path), "--option", "targets=2", "--rules", "uw"]
    words += ["--front", "0", "--lrs", "0.01,0.02", "--seeds", "2", "--epochs", "20"]
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    command = [sys.executable, "-m", "gradbal", *words, "--jobs", "2", "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((killed / "runs.jsonl").exists() and runs(killed)):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = runs(killed)
    for out in (killed, straight):
        assert main([*words, "--out", str(out)]) == 0
    assert first
    assert runs(killed) == runs(straight)
    pages = [json.loads((out / "report.json").read_text()) for out in (killed, straight)]
    assert "gradbal compare mulan --path tiny.arff" in pages[0].pop("made")
    assert pages[1].pop("made")
    assert pages[0] == pages[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no process group gets SIGINT there")
def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    """The command, with two processes, interrupted as a terminal does it."""
    path, out = tiny.mulan(tmp_path / "tiny.arff"), tmp_path / "out"
    words = ["compare", "mulan", "--path", str(path), "--option", "targets=2", "--rules", "uw"]
    words += ["--front", "90", "--seeds", "9", "--epochs", "20", "--jobs", "2", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradbal", *words],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while process.poll() is None and not ((out / "runs.jsonl").exists() and runs(out)):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        f"gradbal compare: interrupted; {out / 'runs.jsonl'} keeps {len(runs(out))} finished runs, "
        "and the same command goes on from there."
    )


@pytest.mark.slow
def test_another_setting_is_another_run(whole: Report, tmp_path: Path) -> None:
    (tmp_path / "runs.jsonl").write_text((whole.settings.out / "runs.jsonl").read_text())
    run(settings(tmp_path, epochs=1), quiet=True)
    assert len(runs(tmp_path)) == 2 * len(runs(whole.settings.out))


# ---------------------------------------------------------------------- what is chosen by what


def test_everyone_tries_the_same_learning_rates_as_often(whole: Report) -> None:
    records = read_records(whole.settings.out / "runs.jsonl", Record)
    tried: dict[Method, set[tuple[float, int]]] = {}
    for each in records:
        method = Method(each.arch, each.rule, each.weights)
        tried.setdefault(method, set()).add((each.lr, each.seed))
    assert len(tried) == 2 + 2 + 2  # tasks alone, plain sum and rule, fixed weights
    for found in tried.values():
        assert len(found) == 2 + 1  # both on the first seed, the better one on the other
        assert {(0.01, 0), (0.03, 0)} <= found
    for method, trained in {**whole.outcome.alone, **whole.outcome.methods}.items():
        scores = {
            each.lr: r.score
            for each, r in records.items()
            if Method(each.arch, each.rule, each.weights) == method and each.seed == 0
        }
        assert trained.lr == min(scores, key=scores.__getitem__)
        assert trained.runs == 2


@pytest.mark.slow
def test_test_examples_choose_nothing(whole: Report, tmp_path: Path) -> None:
    other = run(settings(tmp_path, other_test), quiet=True)
    for name in ("alone", "methods"):
        ours, theirs = getattr(whole.outcome, name), getattr(other.outcome, name)
        for method, trained in ours.items():
            assert trained.lr == theirs[method].lr
            for seed, record in trained.records.items():
                found = theirs[method].records[seed]
                assert record.curve == found.curve
                assert record.validation == found.validation
                assert record.test != found.test
    assert whole.standings[PLAIN].best.method == other.standings[PLAIN].best.method


def test_a_run_ends_where_validation_says() -> None:
    record = train(two_sums, cell(epochs=40, patience=3, lr=0.3))
    assert record.epoch == 1 + record.curve.index(min(record.curve))
    assert len(record.curve) in (40, record.epoch + 3)
    assert record.steps == 3 * record.epoch
    shorter = train(two_sums, cell(epochs=record.epoch, patience=3, lr=0.3))
    assert shorter.test == record.test  # the model of the best epoch was tested
    assert shorter.curve == record.curve[: record.epoch]


def test_a_run_that_diverges_is_the_worst_and_no_failure() -> None:
    record = train(two_sums, cell(lr=1e30))
    assert (record.epoch, record.score) == (0, torch.inf)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_run_is_the_same_again(optimizer: str) -> None:
    state = torch.random.get_rng_state()
    first, again = (train(two_sums, cell(optimizer=optimizer)) for _ in range(2))
    assert first == again
    assert first.curve[-1] < first.curve[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert Record.read(json.loads(json.dumps(first, default=vars))) == first


@pytest.mark.parametrize("rule", ["modo", "forum", "graddrop", "dwa", "famo"])
def test_rules_of_every_kind_train(rule: str) -> None:
    record = train(two_sums, cell(rule=rule, optimizer="adam", lr=0.01))
    assert record.score < record.curve[0]


@pytest.mark.parametrize("arch", ["MMoE", "LearningToBranch"])
@pytest.mark.parametrize("problem", [two_sums, apart])
def test_architectures_train(arch: str, problem: Callable[[int], Problem]) -> None:
    record = train(problem, cell(arch=arch, optimizer="adam", lr=0.01))
    assert isfinite(record.score)
    assert record.test.keys() == {"a", "b"}


def test_a_task_alone_learns_from_its_own_examples() -> None:
    task = cell(arch=ALONE, rule="b", against=())
    record = train(apart, task)
    assert record.validation.keys() == record.test.keys() == {"b"}
    assert record.score == record.validation["b"]["mae"]


# ---------------------------------------------------------------------- fixed weights


def test_fixed_weights_are_even_on_the_simplex() -> None:
    pairs = fixed_weights(2, 9)
    assert len(pairs) == 8  # the equal ones are the plain sum
    assert (1.0, 1.0) not in pairs
    vectors = torch.tensor(fixed_weights(4, 4000), dtype=torch.float64)
    assert (vectors.sum(dim=1) - 4).abs().max() < 1e-5  # they are rounded
    assert vectors.min() > 0
    torch.testing.assert_close(vectors.mean(dim=0), torch.ones_like(vectors[0]), atol=0.05, rtol=0)
    # of an even simplex each share has the variance (m - 1) / (m^2 (m + 1)), here times m^2
    torch.testing.assert_close(
        vectors.var(dim=0), torch.full_like(vectors[0], 0.6), atol=0.05, rtol=0
    )


def test_fixed_weights_weight_the_losses() -> None:
    twice = train(two_sums, cell(rule=FIXED, weights=(2.0, 2.0), lr=0.01))
    once = train(two_sums, cell(rule="ew", lr=0.02))
    assert twice.curve == pytest.approx(once.curve, rel=1e-4)  # under SGD


# ---------------------------------------------------------------------- summing up


def outcome(**changes: list[float]) -> Outcome:
    """Make an outcome in which each method's errors are the tasks' alone times a factor."""
    factors = {"ew": [1.0] * 4, "upgrad": [1.0] * 4, "fixed": [1.0] * 4, **changes}
    numbers = count()

    def trained(tasks: str, some: list[float], score: float) -> Trained:
        records = {}
        for seed, factor in enumerate(some):
            test = {task: {"mae": factor, "rmse": 2 * factor} for task in tasks}
            each = cell(seed=seed, lr=float(next(numbers)))
            records[seed] = Record(each, (score,), 1, 5, test, test)
        return Trained(0.1, 2, records)

    methods = {
        Method(PLAIN, "ew"): trained("ab", factors["ew"], 5.0),
        Method(PLAIN, "upgrad"): trained("ab", factors["upgrad"], 0.0),
        Method(PLAIN, FIXED, (0.5, 1.5)): trained("ab", factors["fixed"], 3.0),
        Method(PLAIN, FIXED, (1.5, 0.5)): trained("ab", [0.1] * 4, 4.0),
    }
    alone = {Method(ALONE, task): trained(task, [1.0] * 4, 1.0) for task in "ab"}
    return Outcome(alone, methods, {}, {"who fails": "why"})


def report(**changes: list[float]) -> Report:
    return Report(settings(Path()), two_sums(0), outcome(**changes))


def entries(found: Report) -> dict[str, dict[str, str]]:
    head, *lines = found.lines()
    return {line[1]: dict(zip(head, line, strict=True)) for line in lines}


def test_differences_are_bold_only_outside_the_noise() -> None:
    """The best fixed weights are those of validation, also where test likes others more."""
    noisy = entries(report(upgrad=[0.5, 1.4, 0.6, 1.3], ew=[1.1, 1.2, 1.1, 1.2]))
    assert list(noisy) == ["tasks alone", "ew", "upgrad", "fixed 0.5 1.5 (best fixed)"]
    assert noisy["fixed 0.5 1.5 (best fixed)"]["less best fixed"] == ""
    assert noisy["fixed 0.5 1.5 (best fixed)"]["runs"] == "6"  # two for each fixed weights
    assert noisy["upgrad"]["runs"] == "2"
    assert noisy["upgrad"]["less best fixed"] == "-5.00 ± 74.07"
    assert noisy["ew"]["less best fixed"] == "**+15.00 ± 9.19**"
    assert noisy["ew"]["Delta_m %"] == "15.00 ± 9.19"
    assert noisy["ew"]["Delta_p %"] == "-15.00 ± 9.19"
    assert [row["mean rank"] for row in noisy.values()] == ["", "3.0", "1.0", "2.0"]


def test_the_verdict_names_who_is_better() -> None:
    better = report(upgrad=[0.9, 0.91, 0.9, 0.91]).words()
    assert "upgrad better than the best fixed weights; none clearly worse" in better
    assert "- who fails: why" in better
    same = report().words()
    assert "no rule is clearly better than the best fixed weights" in same


def test_learning_rates_at_an_end_of_the_grid_are_told() -> None:
    """All were best at 0.1: an end of the first grid, in the middle of the second, alone in the
    third."""
    data, found = two_sums(0), outcome()
    grids = [(0.1, 0.3), (0.03, 0.1, 0.3), (0.1,)]
    told = [Report(replace(settings(Path()), lrs=lrs), data, found)._at_an_end() for lrs in grids]
    fixed = "HPS fixed 0.5 1.5"
    assert told == [["a alone", "b alone", "HPS ew", "HPS upgrad", fixed], [], []]


def test_many_figures_share_columns() -> None:
    data = two_sums(0)
    task = data.tasks["a"]
    many = Report(settings(Path()), replace(data, tasks=dict.fromkeys("ab", task)), outcome())
    many.higher = {f"task {i}": {"mae": False, "rmse": False} for i in range(4)}
    assert many._titles() == ["mean mae", "mean rmse"]


def test_the_report_is_saved(whole: Report) -> None:
    files = {path.name for path in whole.save("gradbal compare here")}
    assert files == {"report.md", "report.json", "time.png", "front_HPS.png"}
    page = (whole.settings.out / "report.md").read_text("utf-8")
    assert whole.words().rstrip() in page
    assert "Made by `gradbal compare here`" in page
    assert all((whole.settings.out / name).stat().st_size > 500 for name in files)
    numbers = json.loads((whole.settings.out / "report.json").read_text())
    assert len(numbers["methods"]) == 4
    assert numbers["methods"][0]["test"].keys() == {"0", "1"}


def test_costs_are_counted(whole: Report) -> None:
    costs = whole.outcome.costs
    assert {rule: found.passes for (_, rule), found in costs.items()}["ew"] == 1
    assert {rule: found.passes for (_, rule), found in costs.items()}["upgrad"] in (1, 2, 3)
    assert all(found.peak and found.peak > 0 for found in costs.values())
    times = whole.standings[PLAIN].times()
    assert [row for row, _ in times] == whole.standings[PLAIN].pool
    assert all(seconds > 0 for _, seconds in times)


# ---------------------------------------------------------------------- what cannot be

BAD = {
    "problem": (
        ["digits"],
        "gradbal compare: unknown problem 'digits'. Did you mean 'two_digits'? There",
    ),
    "neither a problem nor the toy": (
        ["x"],
        f"gradbal compare: unknown problem 'x'. There are toy, {', '.join(PROBLEMS)}.",
    ),
    "path": (["mulan"], "mulan: `path` must say where its files are, got none"),
    "rule": (
        ["two_digits", "--rules", "upgrda"],
        "gradbal compare: unknown rule 'upgrda'. Did you mean 'upgrad'? ",
    ),
    "arch": (
        ["two_digits", "--archs", "hps"],
        "gradbal compare: unknown architecture 'hps'. Did you mean 'HPS'? There are HPS, ",
    ),
    "lr": (["two_digits", "--lrs", "fast"], "gradbal compare: `lrs` must be numbers, got 'fast'."),
    "no lr": (["two_digits", "--lrs", ","], "gradbal compare: `archs` and `lrs` must name at "),
    "optimizer": (
        ["two_digits", "--optimizer", "lion"],
        "gradbal compare: `optimizer` must be one of 'sgd', 'adam', 'adamw', got 'lion'.",
    ),
    "tuned on": (
        ["two_digits", "--tuned-on", "9"],
        "gradbal compare: `tuned_on` must be between 1 and 5, got 9.",
    ),
    "jobs": (["two_digits", "--jobs", "0"], "gradbal compare: `jobs` must be >= 1, got 0."),
    "option": (
        ["two_digits", "--option", "copies"],
        "gradbal compare: `option` must be NAME=VALUE, got 'copies'.",
    ),
    "toy's rule": (
        ["toy", "--rules", "upgrda"],
        "gradbal compare toy: unknown rule 'upgrda'. Did you mean 'upgrad'? ",
    ),
    "toy's protocol": (
        ["toy", "--protocol", "mine"],
        "gradbal compare: `protocol` must be one of 'cagrad', 'nash', 'famo', got 'mine'.",
    ),
}


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_a_wrong_argument_ends_with_one_sentence(
    words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *words, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence)
    assert said.count("\n") == 1


def without_labels(seed: int) -> Problem:
    data = two_sums(seed)
    assert isinstance(data.validation, Examples)
    y: dict[str, Tensor] = {t: torch.full_like(v, torch.nan) for t, v in data.validation.y.items()}
    return replace(data, validation=Examples(data.validation.x, y))


def test_tasks_that_cannot_be_judged_alone_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="every task must be learned alone, to compare with; a fig"
    ):
        run(settings(tmp_path, without_labels), quiet=True)
