"""The benchmarks of whole steps, much reduced: who is compared, what is checked and written."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks import bench_memory, bench_steps, contestants, models
from benchmarks.bench_steps import Cell, figures
from benchmarks.contestants import EW, PEERS, VECTOR, check
from benchmarks.models import MODELS, SharedTrunk, Size, make_model
from gradbal.jacobian.engines import PRESETS
from gradbal.lab.bench.measure import Step, Timing
from gradbal.lab.bench.report import SUMMED

CPU = torch.device("cpu")
TINY = {
    "mlp": Size(batch=4, width=8, depth=2, length=5),
    "cnn": Size(batch=2, width=2, depth=4, length=8),
    "transformer": Size(batch=2, width=8, depth=1, length=3),
    "recommender": Size(batch=4, width=2, depth=1, length=20),
}
WORDS = ["--models", "mlp", "--tasks", "2", "3", "--engines", "sequential", "representation"]
OURS = ["sequential", "representation"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "ON_CORE", TINY)


@pytest.fixture(params=[pytest.param("installed", marks=pytest.mark.slow), "missing"])
def peers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run as if TorchJD were there, by a stand-in, or not: it is no package of the tests."""
    if request.param == "installed":
        monkeypatch.setattr(contestants, "torchjd", lambda model, chunk_size: by_vector(model))
        return list(PEERS)
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    return []


def by_vector(model: SharedTrunk) -> Step:
    return contestants.flat_vector(model)


def tiny_model(name: str) -> SharedTrunk:
    return make_model(name, 3, TINY[name], CPU, torch.float32)


def rows(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines]


# ---------------------------------------------------------------------- who is compared


@pytest.mark.parametrize("name", MODELS)
def test_everyone_steps_with_the_same_gradients(name: str, peers: list[str]) -> None:
    builds = contestants.contestants(PRESETS)
    differences, complaints = check(builds, tiny_model(name), 1e-4)
    assert complaints.keys() == {*PEERS} - {*peers}
    assert {EW, "auto", "sequential", "batched", "factored", VECTOR, *peers} <= differences.keys()
    assert max(differences.values()) < 1e-4


def test_the_flat_vector_is_what_the_rule_says() -> None:
    model = tiny_model("mlp")
    found = contestants.gradient(contestants.contestants(["sequential"])["sequential"], model)
    wanted = contestants.gradient(contestants.flat_vector, model)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, contestants.gradient(contestants.summed, model))


def test_who_does_something_else_is_named() -> None:
    builds = {**contestants.contestants(["sequential"]), "sequential": contestants.summed}
    _, complaints = check(builds, tiny_model("mlp"), 1e-4)
    assert complaints["sequential"].startswith("its gradient differs by ")


# ---------------------------------------------------------------------- the commands


def test_steps_are_timed_and_written(
    peers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "steps.md"
    bench_steps.main([*WORDS, "--seconds", "0", "--out", str(out)])
    page = out.read_text()
    assert page in capsys.readouterr().out
    header, _, *lines = rows(page)
    assert header == ["model", "tasks", SUMMED, EW, *OURS, *PEERS, VECTOR]
    assert [line[:2] for line in lines] == [["`mlp`", "2"], ["`mlp`", "3"]]
    for line in lines:
        entries = dict(zip(header, line, strict=True))
        assert entries[SUMMED].endswith(" ms")
        assert all((entries[peer] == "-") == (peer not in peers) for peer in PEERS)
    missing = "`torchjd`: ModuleNotFoundError: "
    assert page.count(missing) == (0 if peers else 2)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["command"].startswith("python -m benchmarks.bench_steps --models mlp")
    assert record["cells"][0]["times"][EW].keys() == {"median", "low", "high", "rounds"}
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.slow
def test_memory_is_counted_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.md"
    bench_memory.main([*WORDS, "--sizes", "twice as wide", "--out", str(out)])
    page = out.read_text()
    assert page in capsys.readouterr().out
    header, _, *lines = rows(page)
    assert header == ["model", "size", "tasks", "n", SUMMED, EW, *OURS, *PEERS, VECTOR]
    assert len(lines) == 2
    wide, _ = MODELS["mlp"](TINY["mlp"]._replace(width=2 * TINY["mlp"].width))
    for cell in json.loads(out.with_suffix(".json").read_text())["cells"]:
        assert cell["unit"] == sum(p.nbytes for p in wide.parameters())
        assert {SUMMED, EW, *OURS, VECTOR} <= cell["bytes"].keys()
        kept = cell["bytes"][VECTOR] - cell["bytes"][SUMMED]
        assert kept > (cell["n_tasks"] - 1) * cell["unit"]  # rows of all tasks
    assert out.with_suffix(".png").exists()


def test_the_usual_sizes_are_known_on_both_devices() -> None:
    assert models.ON_CARD.keys() == TINY.keys() == MODELS.keys()
    given = argparse.Namespace(device=torch.device("cuda"))
    assert models.size_of("mlp", given.device) == models.ON_CARD["mlp"]


# ---------------------------------------------------------------------- what a run shows


def cell(model: str, n_tasks: int, **seconds: float) -> Cell:
    named = {SUMMED: 1.0, **{name.replace("_", " "): time for name, time in seconds.items()}}
    times = {name: Timing(time, time, time, 5) for name, time in named.items()}
    return Cell(model, n_tasks, times, {}, {})


def test_figures_say_what_was_reached() -> None:
    good = cell("mlp", 8, ew=1.02, auto=2.0, representation=1.1, torchjd=4.0, torchjd_1_by_1=3.0)
    assert list(figures([good])) == [
        "`auto` is never slower than TorchJD's faster mode: so it is.",
        "TorchJD's default mode takes 2.00 times as long (median; to reach: 1.3).",
        "Its faster mode, on the wide MLP: 1.50 at least (to reach: 1.5).",
        "`ew` takes no more than 1.02 times as long + 100 us: so it is.",
        "`representation` takes no more than 1.15 times as long, 8 tasks: so it is.",
    ]


def test_figures_name_the_cells_that_miss_them() -> None:
    bad = cell("cnn", 8, ew=1.03, auto=4.0, representation=1.2, torchjd=5.0, torchjd_1_by_1=3.2)
    assert list(figures([bad])) == [
        "`auto` is never slower than TorchJD's faster mode: not so for cnn x 8 (1.25).",
        "TorchJD's default mode takes 1.25 times as long (median; to reach: 1.3).",
        "`ew` takes no more than 1.02 times as long + 100 us: not so for cnn x 8 (10000 us).",
        "`representation` takes no more than 1.15 times as long, 8 tasks: not so for cnn x 8 "
        "(1.20).",
    ]


def test_figures_need_what_they_compare() -> None:
    assert list(figures([cell("mlp", 2, auto=2.0)])) == []
