from pathlib import Path

import pytest
import torch

from gradbal.lab.demo import automtl
from gradbal.lab.demo.automtl import HEADER, STAGES, Findings, draw, run
from gradbal.lab.demo.model import TASKS
from gradbal.lab.demo.report import delta_m
from gradbal.lab.demo.settings import Settings
from gradbal.lab.models.two_digits import FEATURES, HEIGHT, WIDTH

COPIES = (2, 1, 1)
RULES = ("ew", "upgrad")


def found_in(folder: Path) -> Findings:
    return run(Settings(arch="automtl", rules=RULES, epochs=1, seed=3, out=folder), copies=COPIES)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return found_in(tmp_path_factory.mktemp("automtl"))


@pytest.mark.slow
def test_the_table_has_what_the_search_must_beat(found: Findings) -> None:
    header, *rows = found.rows()
    assert header == HEADER
    kinds = ("hard sharing", "AutoMTL")
    assert [row[0] for row in rows] == ["3 networks", *(f"{k}, {r}" for r in RULES for k in kinds)]
    alone = found.networks[0].outcome.test
    for row, network in zip(rows, found.networks, strict=True):
        assert row[4] == f"{delta_m(network.outcome.test, alone):+.1f}"
    separate, sharing, *_ = found.networks
    assert sharing.parameters < separate.parameters < 3 * sharing.parameters
    for trial, network in zip(found.trials, found.networks[2::2], strict=True):
        only_shared = not any(map(any, trial.record.policy.values()))
        assert only_shared == (network.parameters == sharing.parameters)


@pytest.mark.slow
def test_a_policy_is_shown_operator_by_operator(found: Findings) -> None:
    assert tuple(trial.rule for trial in found.trials) == RULES
    for trial in found.trials:
        header, *rows = trial.rows()
        assert header == ("operator", *TASKS)
        assert [row[0] for row in rows] == list(trial.operators)
        assert len(rows) == 7
        words = ("shared", "own copy", "skipped")
        for column, task in enumerate(TASKS, start=1):
            branches = [words.index(row[column]) for row in rows]
            assert branches == trial.record.policy[task]


@pytest.mark.slow
def test_the_words_give_the_numbers_of_the_table(found: Findings) -> None:
    _, _, *rows = found.rows()
    for rule, sharing, ours in zip(RULES, rows[::2], rows[1::2], strict=True):
        size, work = (
            int(ours[column].replace(",", "")) / int(sharing[column].replace(",", ""))
            for column in (5, 6)
        )
        assert (
            f"- Under {rule}, the network that AutoMTL found has Delta_m {ours[4]}, hard sharing "
            f"{sharing[4]}.\n  It has {size:.2f} times as many parameters and takes {work:.2f} "
            "times as many operations.\n"
        ) in found.words()


def test_an_interrupted_search_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(automtl, "search", interrupted)
    sentence = "^the search is not finished, so there is no policy$"
    with pytest.raises(KeyboardInterrupt, match=sentence):
        found_in(tmp_path)


@pytest.mark.slow
def test_pictures_are_png_files(found: Findings, tmp_path: Path) -> None:
    files = draw(found, tmp_path)
    names = [f"{what}-{rule}.png" for rule in RULES for what in ("policy", "search")]
    assert [file.name for file in files] == names
    assert all(file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for file in files)


@pytest.mark.slow
def test_same_seed_same_search(found: Findings, tmp_path: Path) -> None:
    again = found_in(tmp_path)
    policies = [[trial.record.policy for trial in some.trials] for some in (again, found)]
    assert policies[0] == policies[1]
    assert again.rows()[3] == found.rows()[3]


def test_the_stages_make_an_encoder() -> None:
    encoder = torch.nn.Sequential(*(stage() for stage in STAGES))
    assert encoder(torch.zeros(2, 1, HEIGHT, WIDTH)).shape == (2, FEATURES)
