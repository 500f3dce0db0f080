"""The command ``gradbal bench``, and how time and memory are measured."""

import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from gradbal.cli import main
from gradbal.jacobian.engines import PRESETS
from gradbal.lab.bench import measure
from gradbal.lab.bench.measure import ROUNDS, WARMUP, Step, in_turn, peaks

CPU = torch.device("cpu")
MODEL = """
    import torch
    from torch import nn

    def make():
        model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 1), nn.Linear(6, 1)])
        x = torch.ones(5, 4)

        def losses():
            z = model[0](x).tanh()
            return {"a": model[1](z).square().mean(), "b": (model[2](z) - 1).square().mean()}

        return model, losses

    def with_optimizer():
        model, losses = make()
        return model, losses, torch.optim.SGD(model.parameters(), lr=0.1)

    def without_graph():
        model, losses = make()
        return model, lambda: [loss.detach() for loss in losses().values()]

    def alone():
        return make()[0]

    def strange():
        model, losses = make()
        return model, losses, 7

    def no_losses():
        model, losses = make()
        return model, lambda: 3.0

    number = 3
"""
BAD = {
    "no colon": (["mine"], "expected `module:function`, got 'mine'."),
    "no function": (["mine:"], "expected `module:function`, got 'mine:'."),
    "no module": (["nowhere:make"], "cannot import 'nowhere' (No module named 'nowhere')."),
    "misspelt": (
        ["mine:maek"],
        "module 'mine' has no function 'maek'. Did you mean 'make'?",
    ),
    "no callable": (
        ["mine:number"],
        "module 'mine' has no function 'number'.",
    ),
    "model alone": (
        ["mine:alone"],
        "mine:alone must return (model, losses_fn) or (model, losses_fn, optimizer), "
        "got (ModuleList).",
    ),
    "no optimizer": (
        ["mine:strange"],
        "mine:strange must return (model, losses_fn) or (model, losses_fn, optimizer), "
        "got (ModuleList, function, int).",
    ),
    "no losses": (
        ["mine:no_losses"],
        "Losses: expected a list, a tuple, a mapping or a 1-D tensor of losses, got float.",
    ),
    "no graph": (
        ["mine:without_graph"],
        "a step with the summed loss fails: RuntimeError: element 0 of tensors does not require "
        "grad and does not have a grad_fn",
    ),
    "unknown engine": (
        ["mine:make", "--engines", "fast"],
        f"`engines` must be one of {', '.join(map(repr, PRESETS))}, got 'fast'.",
    ),
    "unknown rule": (
        ["mine:make", "--rules", "upgrda"],
        "unknown rule 'upgrda'. Did you mean 'upgrad'? `gradbal list` shows all of them.",
    ),
    "unknown rule, no model": (
        ["--rules", "upgrda"],
        "unknown rule 'upgrda'. Did you mean 'upgrad'? `gradbal list` shows all of them.",
    ),
    "no rule": (["--rules", ","], "`rules` must name at least one rule."),
    "no tasks": (["--tasks", "0"], "`tasks` must be >= 1, got 0."),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr("gradbal.lab.commands.BENCH_SECONDS", 0.0)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[list[str]], list[str]]:
    """Run the command; return the table's cells, without its lines, and the sentences below."""
    assert main(["bench", *words]) == 0
    table, _, below = capsys.readouterr().out.partition("\n\n")
    header, _, *rows = (line.split("  ") for line in table.splitlines())
    return [[cell.strip() for cell in row if cell.strip()] for row in [header, *rows]], (
        below.splitlines()
    )


# ---------------------------------------------------------------------- the command


def test_rules_alone_are_timed_for_each_number_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["ew", "sdmgrad"]
    header, *rows = said(capsys, "--rules", ",".join(names), "--tasks", "2", "3")[0]
    assert header == ["rule", "2 tasks", "3 tasks"]
    assert [row[0] for row in rows] == names
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


@pytest.mark.slow
@pytest.mark.parametrize("function", ["make", "with_optimizer"])
def test_a_model_is_timed_with_every_rule_and_engine(
    function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--rules", "upgrad,sdmgrad", "--engines", "sequential, factored,representation"]
    (header, *rows), below = said(capsys, f"mine:{function}", *words)
    assert header == ["rule", "engine", "ms", "quartiles", "x summed loss", "peak MB"]
    engines = ["sequential", "factored", "representation"]
    assert [row[:2] for row in rows] == [
        ["(summed loss)", "-"],
        ["ew", "auto"],
        *(["upgrad", engine] for engine in engines),
        *(["sdmgrad", engine] for engine in engines),
    ]
    assert all(len(row) == len(header) for row in rows)
    assert below[0].startswith("A step with the summed loss takes ")
    assert below[1].startswith("`ew` takes ")
    assert below[2].startswith("`upgrad` is fastest with ")
    assert below[3].startswith("With `representation` it takes ")


@pytest.mark.slow
def test_what_fails_is_said_below(capsys: pytest.CaptureFixture[str]) -> None:
    rows, below = said(capsys, "mine:make", "--rules", "moco", "--engines", "representation")
    assert [row[0] for row in rows[1:]] == ["(summed loss)", "ew"]
    assert below[-1].startswith(
        "`moco` with `representation` fails: ValueError: MTLOptimizer: MoCo"
    )


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_a_wrong_argument_ends_with_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"gradbal bench: {sentence}\n"


# ---------------------------------------------------------------------- time


def test_everyone_takes_as_many_steps_as_the_others() -> None:
    counts = {"a": 0, "b": 0}

    def maker(name: str) -> Callable[[], Step]:
        def step() -> None:
            counts[name] += 1

        return lambda: step

    times, complaints = in_turn({name: maker(name) for name in counts}, 0.0, CPU)
    assert counts == dict.fromkeys(counts, WARMUP + ROUNDS)
    assert not complaints
    for time in times.values():
        assert time.rounds == ROUNDS
        assert 0 < time.low <= time.median <= time.high


def test_rounds_go_on_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(measure, "perf_counter", lambda: float(next(ticks)))
    times, _ = in_turn({"only": lambda: lambda: None}, 60.0, CPU)
    assert times["only"].rounds == 22  # a round reads the clock twice, from the fifth on thrice
    assert times["only"].median == times["only"].low == times["only"].high == 1


def test_who_raises_is_left_out() -> None:
    def make() -> Step:
        raise RuntimeError("no room\nfor two lines")

    times, complaints = in_turn({"bad": make, "good": lambda: lambda: None}, 0.0, CPU)
    assert list(times) == ["good"]
    assert complaints == {"bad": "RuntimeError: no room"}


def test_a_device_is_waited_for_before_the_clock_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: said.append(device.type))
    monkeypatch.setattr(measure, "perf_counter", lambda: said.append("clock") or 0.0)
    in_turn({"only": lambda: lambda: said.append("step")}, 0.0, torch.device("cuda"))
    assert said[WARMUP + 1 :][:5] == ["cuda", "clock", "step", "cuda", "clock"]


# ---------------------------------------------------------------------- memory


def buffer(megabytes: int) -> torch.Tensor:
    return torch.empty(megabytes * 10**6, dtype=torch.uint8)


def holding(kept: int, taken: int) -> Step:
    """Return a step that takes two blocks, gives one back, and takes another."""
    held = [buffer(kept)]

    def step() -> None:
        first, second = buffer(taken), buffer(1)
        del first, second
        held[0] = buffer(kept)  # before the old one goes

    return step


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_peaks_are_exact(times: int) -> None:
    before = buffer(7)
    makers = [lambda: holding(2, 4), lambda: holding(5, 3), lambda: lambda: None]
    assert peaks(makers * times, CPU) == [7_000_000, 10_000_000, 0] * times
    del before


def test_peaks_count_a_training_step() -> None:
    n = 1000 * 1000 * 4

    def make() -> Step:
        weight = torch.zeros(1000, 1000, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)

        def step() -> None:
            weight.grad = None
            torch.autograd.backward(weight.sum())
            optimizer.step()

        return step

    assert 2 * n <= peaks([make], CPU)[0] < 2.1 * n  # parameter and gradient


class Card:
    """The part of a device's module that counts."""

    held = most = 0

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)

    def memory_allocated(self, device: torch.device) -> int:
        return self.held

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.most = self.held

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.most


@pytest.mark.parametrize("counter", [Card(), object()], ids=["counts", "does not"])
def test_a_device_counts_for_itself(counter: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Step:
        assert isinstance(counter, Card)
        counter.take(100)
        counter.take(-90)

        def step() -> None:
            counter.take(5)
            counter.take(-5)

        return step

    monkeypatch.setattr(torch, "get_device_module", lambda device: counter)
    found = peaks([make, make], torch.device("cuda"))
    assert found == ([15, 15] if isinstance(counter, Card) else [])
