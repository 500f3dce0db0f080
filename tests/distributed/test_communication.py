"""What several processes send each other: as much as the formulas say, and who sends it."""

import json
from pathlib import Path

import pytest
from distributed.pool import Pool

from benchmarks import communication
from benchmarks.models import Size
from benchmarks.spread import MODES, OTHERS, Cell, Job, measure

SIZE = Size(batch=4, width=128, depth=2, length=32)  # rows are long enough to travel in parts
LITTLE = Size(batch=4, width=16, depth=2, length=32)
N_TASKS = 3
OURS = [name for name, mode in MODES.items() if mode.rule not in (None, "ew") and not mode.sharded]
KINDS = {
    "upgrad": {"rows": N_TASKS, "direction": 1, "gradients": 1},
    "upgrad, streaming": {"rows": N_TASKS, "gradients": 2},
    "upgrad, representation": {"gradients": 2},
    "graddrop": {"rows": 1, "gradients": 1},
}


def check(pool: Pool, size: Size = SIZE) -> Cell:
    """Return what the first process has counted; the others have counted the same."""
    first, *others = pool(measure, Job("mlp", size, N_TASKS, rounds=1))
    assert all(other.volumes == first.volumes for other in others)
    return first


def agreed(cell: Cell, mode: str) -> int:
    sent = cell.volumes[mode].sent
    return sent.get("agreement", 0) + sent.get("gram", 0)


def test_two_processes_send_what_the_formulas_say(two: Pool) -> None:
    cell = check(two)
    for mode, volume in cell.volumes.items():
        assert volume.total - agreed(cell, mode) == pytest.approx(cell.expected(mode)), mode
        assert agreed(cell, mode) < 1000, mode
    for mode in OURS:
        calls = {
            k: n for k, n in cell.volumes[mode].calls.items() if k not in ("agreement", "gram")
        }
        assert calls == {**KINDS[mode], OTHERS: 0}, mode
        assert cell.volumes[mode].sent[OTHERS] == 0, mode


def test_four_processes_send_what_the_formulas_say(four: Pool) -> None:
    cell = check(four)
    for mode, volume in cell.volumes.items():
        # ten outputs of a head in four parts: fully_shard fills them up
        wanted = pytest.approx(cell.expected(mode), rel=0.03 if MODES[mode].sharded else 1e-6)
        assert volume.total - agreed(cell, mode) == wanted, mode
        assert agreed(cell, mode) < 5000, mode


@pytest.mark.slow
def test_short_rows_go_whole_in_one_message(two: Pool) -> None:
    volume = check(two, LITTLE).volumes["upgrad"]
    n_entries = 32 * 16 + 16 + 16 * 16 + 16
    assert volume.sent["rows"] == N_TASKS * 4 * n_entries
    assert volume.calls["rows"] == 1
    assert "direction" not in volume.calls


@pytest.mark.slow
def test_the_command_starts_processes_and_writes_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(communication, "SIZES", {"mlp": LITTLE})
    out = tmp_path / "new" / "communication.md"
    words = ["--processes", "1", "2", "--tasks", "2", "--rounds", "1", "--out", str(out)]
    communication.main(words)
    page = out.read_text()
    assert page in capsys.readouterr().out
    assert page.count("| `mlp` | 2 | 2 |") == 3  # bytes, time, memory
    assert page.count("| `mlp` | 1 | 2 |") == 2  # a process alone sends nothing
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["command"].startswith("python -m benchmarks.communication --processes 1 2")
    cells = record["cells"]
    assert [cell["n_processes"] for cell in cells] == [1, 2]
    assert all(cell["peaks"].keys() == cell["seconds"].keys() == MODES.keys() for cell in cells)
