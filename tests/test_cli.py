import errno
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor

import gradbal
from gradbal import make_rule, rule_names
from gradbal.cli import main, markdown_table, plain_table, rule_rows
from gradbal.lab import checks, commands, demo
from gradbal.lab.demo import automtl
from gradbal.lab.training import resume
from gradbal.rules import _registry as registry
from gradbal.rules._base import GradientRule, GramRule, LossRule, Rule
from gradbal.rules._registry import RULES

ROOT = Path(__file__).parent.parent
KINDS = {
    LossRule: ("losses", "nothing"),
    GramRule: ("Gram matrix", "gradient norms"),
    GradientRule: ("gradients",),
}
BAD = {
    "unknown rule": (
        ["demo", "--rules", "uw,upgrda"],
        "gradbal demo: unknown rule 'upgrda'. Did you mean 'upgrad'? "
        "`gradbal list` shows all of them.\n",
    ),
    "unknown architecture": (
        ["demo", "--arch", "XNet"],
        "gradbal demo: `arch` must be one of 'HPS', 'CrossStitch', 'MMoE', 'MTAN', 'CGC', 'PLE', "
        "'DSelectK', 'LearningToBranch', 'automtl', got 'XNet'.\n",
    ),
    "no rule": (["demo", "--rules", " ,"], "gradbal demo: `rules` must name at least one rule.\n"),
    "no epoch": (["demo", "--epochs", "0"], "gradbal demo: `epochs` must be >= 1, got 0.\n"),
    "no number": (
        ["demo", "--epochs", "ten"],
        "gradbal demo: argument --epochs: invalid int value: 'ten'; see `gradbal demo --help`.\n",
    ),
    "negative seed": (
        ["demo", "--seed", "-1"],
        "gradbal demo: `seed` must be between 0 and 4294967295, got -1.\n",
    ),
    "unknown device": (
        ["demo", "--device", "abacus"],
        "gradbal demo: `device` must be one that torch can compute on here, got 'abacus'.\n",
    ),
    "device without memory": (
        ["demo", "--device", "meta"],
        "gradbal demo: `device` must be one that torch can compute on here, got 'meta'.\n",
    ),
    "option of another command": (
        ["list", "--epochs", "3"],
        "gradbal list: unrecognized arguments: --epochs 3; see `gradbal list --help`.\n",
    ),
    "unknown option": (
        ["demo", "--nonsense"],
        "gradbal demo: unrecognized arguments: --nonsense; see `gradbal demo --help`.\n",
    ),
    "unknown option without a command": (
        ["--nonsense"],
        "gradbal: unrecognized arguments: --nonsense; see `gradbal --help`.\n",
    ),
    "abbreviated option": (
        ["demo", "--rule", "ew"],
        "gradbal demo: unrecognized arguments: --rule ew; see `gradbal demo --help`.\n",
    ),
}


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 0
    captured = capsys.readouterr()
    assert not captured.err
    return captured.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert not captured.out
    return captured.err


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys)
    assert shown.startswith("usage: gradbal")
    assert "list" in shown
    assert "demo" in shown


def test_list_has_one_line_per_rule(capsys: pytest.CaptureFixture[str]) -> None:
    header, line, *rows = said(capsys, "list").splitlines()
    assert header.split()[0] == "rule"
    assert set(line) == {"-", " "}
    assert [row.split()[0] for row in rows] == sorted(RULES)


@pytest.mark.parametrize("row", rule_rows()[1:], ids=lambda row: row[0])
def test_list_says_what_the_class_says(row: tuple[str, ...]) -> None:
    name, paper, looks_at, keeps, random, scale, heads = row
    rule = make_rule(name)
    kind = next(words for base, words in KINDS.items() if isinstance(rule, base))
    assert paper
    assert looks_at.split(",")[0] in kind
    assert ("losses" in looks_at) == rule.needs_losses
    assert keeps.startswith("learns") == bool(rule.learned)
    assert ("after the step" in keeps) == (type(rule).observe is not Rule.observe)
    assert random in ("yes", "-")
    assert scale == rule.scale
    assert heads in (rule.heads, "own")


def test_list_finds_out_who_draws_random_numbers_and_who_weights_heads_apart() -> None:
    rows = {name: rest for name, *rest in rule_rows()[1:]}
    assert [rows[name][3] for name in ("rlw", "pcgrad", "graddrop")] == ["yes"] * 3
    assert [rows[name][3] for name in ("ew", "upgrad", "dwa", "nash_mtl")] == ["-"] * 4
    assert [rows[name][5] for name in ("nash_mtl", "imtl", "uw", "upgrad")] == [
        "weighted",
        "own",
        "weighted",
        "plain",
    ]


def test_the_page_of_guarantees_shows_the_claims(capsys: pytest.CaptureFixture[str]) -> None:
    table = said(capsys, "list", "--claims", "--markdown").strip()
    assert table in (ROOT / "docs" / "guarantees.md").read_text()


def test_readme_shows_the_table_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "list", "--markdown").strip()
    tables = re.findall(
        r"(?:^\|.*\|\n)+", (ROOT / "README.md").read_text("utf-8"), flags=re.MULTILINE
    )
    assert printed in [table.strip() for table in tables]


def test_tables_hold_every_cell() -> None:
    rows = [("name", "size"), ("a", "10"), ("long name", "-")]
    assert plain_table(rows).splitlines() == [
        "name       size",
        "---------  ----",
        "a            10",
        "long name     -",
    ]
    assert markdown_table(rows, code=True).splitlines() == [
        "| name | size |",
        "|---|---|",
        "| `a` | 10 |",
        "| `long name` | - |",
    ]


@pytest.mark.parametrize(("words", "sentence"), BAD.values(), ids=BAD)
def test_a_wrong_argument_ends_with_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, *words) == sentence


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capsys, "dmeo")
    assert sentence.startswith("gradbal: argument command: invalid choice: 'dmeo'")
    assert sentence.count("\n") == 1


SAVING = {  # commands that train and then save files
    "gradbal demo": ["demo"],
    "gradbal demo, a search": ["demo", "--arch", "automtl"],
    "gradbal compare": ["compare", "two_digits"],
    "gradbal compare, the toy": ["compare", "toy"],
}


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if anything trains."""
    for owner, name in ((demo.contest, "train"), (automtl, "search"), (resume, "_trained")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("trained"))


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", SAVING)
def test_out_must_be_a_folder(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    assert refused(capsys, *SAVING[name], "--out", str(taken)) == (
        f"{name.partition(',')[0]}: `out` must be a folder that can be written, got "
        f"{str(taken)!r} (File exists).\n"
    )


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", SAVING)
def test_out_must_take_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(dir: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(checks, "TemporaryFile", denied)  # root may write anywhere
    assert refused(capsys, *SAVING[name], "--out", str(tmp_path)) == (
        f"{name.partition(',')[0]}: `out` must be a folder that can be written, got "
        f"{str(tmp_path)!r} (Permission denied).\n"
    )


def test_the_check_of_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    checks.new_folder("mine", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("name", "gone", "sentence"),
    [
        ("gradbal demo", ["sklearn"], 'needs scikit-learn; run `pip install "gradbal[demo]"`.'),
        (
            "gradbal demo, a search",
            ["sklearn", "matplotlib"],
            'needs scikit-learn and matplotlib; run `pip install "gradbal[demo]"`.',
        ),
        ("gradbal demo", ["tqdm"], 'needs tqdm; run `pip install "gradbal[demo]"`.'),
        (
            "gradbal compare",
            ["scipy", "sklearn"],
            'needs scipy and scikit-learn; run `pip install "gradbal[compare]"`.',
        ),
        (
            "gradbal compare, the toy",
            ["matplotlib"],
            'needs matplotlib; run `pip install "gradbal[compare]"`.',
        ),
    ],
)
def test_missing_packages_are_named_before_training(
    name: str,
    gone: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in gone:
        monkeypatch.setitem(sys.modules, module, None)
    said = refused(capsys, *SAVING[name], "--out", str(tmp_path))
    assert said == f"{name.partition(',')[0]}: {sentence}\n"


KEPT = "keeps 0 finished runs, and the same command goes on from there"


@pytest.mark.parametrize(
    ("name", "owner", "function", "reached"),
    [
        (
            "gradbal demo",
            demo.contest,
            "_train",
            "0 of 14 epochs are trained, so there are no scores yet",
        ),
        (
            "gradbal demo, a search",
            automtl,
            "search",
            "the search is not finished, so there is no policy",
        ),
        ("gradbal compare", resume, "_trained", f"@runs.jsonl {KEPT}"),
        ("gradbal compare, the toy", resume, "_trained", f"@toy.jsonl {KEPT}"),
    ],
)
def test_an_interrupt_ends_with_one_line(
    name: str,
    owner: object,
    function: str,
    reached: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, function, interrupted)
    with pytest.raises(SystemExit) as ended:
        main([*SAVING[name], "--out", str(tmp_path)])
    assert ended.value.code == 130
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]  # below tqdm's bar
    assert last == f"{name.partition(',')[0]}: interrupted; {reached}.".replace(
        "@", str(tmp_path) + os.sep
    )
    assert not captured.out


def test_an_interrupt_with_nothing_to_say_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "rule_times", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["bench"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "gradbal bench: interrupted.\n"


def test_demo_prints_its_table_and_where_the_pictures_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run", partial(demo.run, copies=(2, 1, 1)))
    out = tmp_path / "new" / "folder"
    shown = said(capsys, "demo", "--rules", "upgrad, uw,upgrad", "--epochs", "1", "--out", str(out))
    names = [line.split("  ")[0] for line in shown.splitlines()]
    assert names[2:7] == ["single task", "ew", "upgrad", "uw", ""]
    assert "What the numbers of this run mean:" in names
    assert shown.rstrip().endswith(
        f"Pictures: {out / 'learning-curves.png'} {out / 'weights-and-cosines.png'}"
    )


def test_demo_prints_its_table_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(demo, "run", partial(demo.run, copies=(2, 1, 1)))
    monkeypatch.setattr(demo, "draw", full)
    with pytest.raises(OSError, match=r"^No space left on device$"):
        main(["demo", "--rules", "ew", "--epochs", "1", "--out", str(tmp_path)])
    assert "single task" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_of_a_search_prints_its_policy_and_what_it_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(automtl, "run", partial(automtl.run, copies=(2, 1, 1)))
    shown = said(capsys, "demo", "--arch", "automtl", "--epochs", "1", "--out", str(tmp_path))
    lines = shown.splitlines()
    assert lines[0] == "The policy under upgrad"
    assert lines[2].split() == ["operator", "left", "right", "distance"]
    names = [line.split("  ")[0] for line in lines[lines.index("", 3) + 3 :]]
    assert names[:3] == ["3 networks", "hard sharing, upgrad", "AutoMTL, upgrad"]
    files = [tmp_path / f"{what}-upgrad.png" for what in ("policy", "search")]
    assert shown.rstrip().endswith(f"Pictures: {files[0]} {files[1]}")


def run(*words: str) -> str:
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_python_dash_m_is_the_same_command() -> None:
    assert run("-m", "gradbal", "--version") == f"gradbal {gradbal.__version__}\n"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--version"], ["list"]])
def test_quick_commands_load_nothing_that_looks_for_a_compiler(words: list[str]) -> None:
    code = f"""
import sys
from gradbal.cli import main
try:
    main({words})
except SystemExit as ended:
    assert ended.code == 0
print("torch.utils.benchmark" in sys.modules, "torch.utils.cpp_extension" in sys.modules)
"""
    assert run("-c", code).splitlines()[-1] == "False False"


@pytest.mark.slow
def test_import_gradbal_stays_light() -> None:
    heavy = {"gradbal.cli", "gradbal.lab.demo", "matplotlib", "sklearn", "tqdm", "cvxpy"}
    code = f"import sys, torch; old = {{*sys.modules}}; import gradbal; print({heavy} & "
    assert run("-c", code + "({*sys.modules} - old))") == "set()\n"  # torch itself has tqdm


# ---------------------------------------------------------------------- what the pages show


def snippets(page: str) -> str:
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(dedent(block) for _, block in blocks)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(4, 6)
        self.heads = torch.nn.Linear(6, 1), torch.nn.Linear(6, 1)
        self.both = torch.nn.ModuleList(self.heads)

    def forward(self, batch: Tensor) -> list[Tensor]:
        features = self.encoder(batch).tanh()
        return [head(features).square().mean() for head in self.heads]


def test_what_the_readme_shows_runs(capsys: pytest.CaptureFixture[str]) -> None:
    batch = torch.randn(8, 4)
    known: dict[str, Any] = {
        "gradbal": gradbal,
        "torch": torch,
        "model": Net(),
        "compute_losses": lambda model, batch: model(batch),
        "loader": [batch, batch + 1],
        "pieces": batch.split(4),
        "device": "cpu",
    }
    exec(snippets("README.md"), known)
    assert "tensor(" in capsys.readouterr().out
    assert known["scaler"].get_scale() > 0


def test_the_rule_of_the_contributing_guide_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(RULES))
    known: dict[str, Any] = {"__name__": "guide"}
    exec(snippets("CONTRIBUTING.md"), known)
    result = gradbal.aggregate(torch.eye(2), known["Inverse"](), losses=[0.5, 4.0])
    assert result.direction.tolist() == [2.0, 0.25]
    assert "inverse" not in rule_names()
