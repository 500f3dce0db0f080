import copy
import math
import re
from pathlib import Path

import pytest
import torch

from gradbal.lab.demo import Report, Settings, contest, draw, run
from gradbal.lab.demo.contest import Balanced, Learner, judge, new_model, train
from gradbal.lab.demo.model import TASKS, Scores, TwoDigitNet, problem, scores_of
from gradbal.lab.demo.report import HEADER, Look, Outcome, best_epoch, delta_m
from gradbal.lab.models.architectures import ARCHITECTURES
from gradbal.lab.models.two_digits import HEIGHT, WIDTH
from gradbal.lab.problems import pictures
from gradbal.lab.problems.pictures import compose, split, two_digits
from gradbal.lab.problems.problem import Batch, Problem, Split
from gradbal.lab.training.loop import losses_of, one_thread

COPIES = (2, 1, 1)
RULES = ("uw", "famo", "gradnorm", "graddrop", "upgrad")  # every kind of rule


@pytest.fixture(scope="module")
def data() -> Problem:
    return problem(3, COPIES)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    settings = Settings(rules=RULES, epochs=2, seed=3, out=tmp_path_factory.mktemp("demo"))
    return run(settings, copies=COPIES)


def whole(split: Split) -> Batch:
    return next(split.batches(len(split)))


# ---------------------------------------------------------------------- architectures


@pytest.mark.parametrize(
    "arch",
    [
        "HPS",
        "MMoE",
        *(
            pytest.param(a, marks=pytest.mark.slow)
            for a in ARCHITECTURES
            if a not in ("HPS", "MMoE")
        ),
    ],
)
def test_every_architecture_learns_all_tasks(arch: str, data: Problem) -> None:
    settings = Settings(rules=("upgrad",), arch=arch, epochs=1, seed=3)
    model = new_model(settings, data, arch)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = Balanced("upgrad", model, data, settings)
    first = sum(losses_of(model, data.tasks, whole(data.train))[0].values()).item()
    for number in range(15):
        learner.step(whole(data.train), number)
    learner.end_epoch()
    assert sum(losses_of(model, data.tasks, whole(data.train))[0].values()).item() < first
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert scores_of(model, data, data.test) == scores_of(model, data, data.test)
    assert model.training


# ---------------------------------------------------------------------- pictures


def test_same_seed_same_pictures() -> None:
    splits, again, other = (two_digits(seed, COPIES) for seed in (3, 3, 4))
    for part, same, different in zip(splits, again, other, strict=True):
        assert torch.equal(part.x, same.x)
        assert all(torch.equal(part.y[task], same.y[task]) for task in TASKS)
        assert not torch.equal(part.x, different.x)


def test_every_pair_of_digits_is_equally_frequent() -> None:
    for part, copies in zip(two_digits(3, COPIES), COPIES, strict=True):
        pairs = (10 * part.y["left"] + part.y["right"]).bincount(minlength=100)
        assert pairs.tolist() == [copies] * 100
        assert part.x.shape == (100 * copies, 1, HEIGHT, WIDTH)


def test_no_digit_is_in_two_splits() -> None:
    labels = torch.arange(200) % 10
    parts = split(labels, torch.Generator().manual_seed(0))
    assert torch.cat(parts).sort().values.tolist() == list(range(200))
    assert [labels[part].bincount().tolist() for part in parts] == [[12] * 10, [4] * 10, [4] * 10]


def test_labels_are_those_of_the_digits_and_distance_is_measured_on_the_ink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pictures, "NOISE", 0.0)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 10
    digits = torch.rand(30, 8, 8, generator=generator) + labels[:, None, None]  # ink tells which
    made = compose(digits, labels, 2, generator)
    halves = made.x[:, 0].double().tensor_split(2, dim=2)
    centres = []
    for half, start, digit in zip(halves, (0, 12), (made.y["left"], made.y["right"]), strict=True):
        ink = half.sum(dim=(1, 2))
        assert torch.equal((ink / 64).floor().long(), digit)
        y = (half.sum(dim=2) * torch.arange(12)).sum(dim=1) / ink
        x = (half.sum(dim=1) * torch.arange(start, start + 12)).sum(dim=1) / ink
        centres.append((x, y))
    (x1, y1), (x2, y2) = centres
    torch.testing.assert_close(made.y["distance"], torch.hypot(x2 - x1, y2 - y1).float())


# ---------------------------------------------------------------------- scores


def test_delta_m_of_a_worked_example() -> None:
    baseline = {"left": 0.8, "right": 0.5, "distance": 0.2}
    # 10 % more accuracy counts -10, 20 % less +20, 25 % more error +25
    scores = {"left": 0.88, "right": 0.4, "distance": 0.25}
    assert delta_m(scores, baseline) == pytest.approx((-10 + 20 + 25) / 3)
    assert delta_m(baseline, baseline) == 0
    assert math.isnan(delta_m(scores, {**baseline, "right": 0.0}))


def test_best_epoch_knows_which_way_is_better() -> None:
    values = [0.4, 0.9, 0.2, 0.9, 0.2]
    assert best_epoch(values, "left") == 1
    assert best_epoch(values, "distance") == 2
    assert best_epoch(values) == 2


# ---------------------------------------------------------------------- training


def test_single_task_baseline_leaves_the_other_heads_alone(data: Problem) -> None:
    settings = Settings(epochs=1)
    learner = Learner("right", new_model(settings, data, settings.arch), data, settings)
    before = copy.deepcopy(learner.model.state_dict())
    learner.step(whole(data.train), 0)
    moved = {n for n, new in learner.model.state_dict().items() if not torch.equal(new, before[n])}
    assert any(not name.startswith("body.heads.") for name in moved)
    assert any(name.startswith("body.heads.right.") for name in moved)
    others = ("body.heads.left.", "body.heads.distance.")
    assert not any(name.startswith(others) for name in moved)


def test_ew_follows_plain_torch(data: Problem) -> None:
    settings = Settings(epochs=1)
    start = new_model(settings, data, settings.arch)
    ours = Balanced("ew", copy.deepcopy(start), data, settings)
    plain = Learner("", copy.deepcopy(start), data, settings)
    for number, batch in enumerate(data.train.batches(20)):
        ours.step(batch, number)
        plain.optimizer.zero_grad()
        torch.autograd.backward(
            torch.stack(list(losses_of(plain.model, data.tasks, batch)[0].values())).sum()
        )
        plain.optimizer.step()
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_looking_at_gradients_changes_nothing(data: Problem) -> None:
    settings = Settings(epochs=1)
    learner = Balanced("rlw", new_model(settings, data, settings.arch), data, settings)
    before, draws = copy.deepcopy(learner.model.state_dict()), torch.get_rng_state()
    ours = copy.deepcopy(learner.optimizer.core.state_dict())
    seen = learner.observe(whole(data.train))
    assert "gradbal/conflict_share" in seen
    assert all(torch.equal(t, before[n]) for n, t in learner.model.state_dict().items())
    assert all(param.grad is None for param in learner.model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)
    assert repr(learner.optimizer.core.state_dict()) == repr(ours)


def test_validation_chooses_the_epoch_that_is_tested(data: Problem) -> None:
    settings = Settings(epochs=3)
    model = new_model(settings, data, settings.arch)
    alone = [Learner(task, copy.deepcopy(model), data, settings) for task in TASKS]
    together = [Balanced("ew", copy.deepcopy(model), data, settings)]
    train(alone, together, data, settings)
    for epoch, scores in enumerate(together[0].validation):
        scores.update(left=0.5, right=0.5, distance=0.1 if epoch == 1 else 0.2)
    alone[2].validation[0]["distance"] = 0.01
    baseline, (outcome,) = judge(alone, together)
    assert baseline.test["distance"] == alone[2].test(0)["distance"]
    assert outcome.test == together[0].test(1)
    assert outcome.test != together[0].test(2)


# ---------------------------------------------------------------------- the whole


def test_everyone_starts_alike_and_sees_the_same_first_batch(report: Report) -> None:
    first = [outcome.looks[0] for outcome in report.outcomes]
    assert [look.step for look in first] == [0] * len(first)
    for look in first:
        assert look.cosines == pytest.approx(first[0].cosines, abs=1e-6)
        assert look.conflict == any(cosine < 0 for cosine in look.cosines.values())


def test_table_has_a_row_per_rule(report: Report) -> None:
    header, alone, *rows = report.rows()
    assert header == HEADER
    assert alone[0] == "single task"
    assert [row[0] for row in rows] == ["ew", *RULES]
    assert rows[0][5] == "1.00"
    for row, outcome in zip(rows, report.outcomes, strict=True):
        assert float(row[4]) == pytest.approx(
            delta_m(outcome.test, report.baseline.test), abs=0.051
        )
        assert 0 <= float(row[6]) <= 100


def test_the_words_give_the_numbers_of_the_table(report: Report) -> None:
    _, _, *rows = report.rows()
    words = report.words().splitlines()
    for column, start, end in ((4, "- Delta_m is ", ". Above 0"), (5, "- A step takes ", " times")):
        (line,) = (line for line in words if line.startswith(start))
        said = line.removeprefix(start).partition(end)[0]
        cells = {row[0]: row[column] for row in rows}  # several may be the lowest when rounded
        for choose, part in zip((min, max), said.split(" to "), strict=True):
            number, name = part.removesuffix(")").split(" (")
            assert number == cells[name] == choose(cells.values(), key=float)


def test_the_words_name_the_task_that_changes_most() -> None:
    alone = Outcome("single task", [], {"left": 0.8, "right": 0.5, "distance": 0.2})
    look = Look(0, None, {}, False)
    outcomes = [
        Outcome(name, [], {"left": 0.72, "right": right, "distance": 0.15}, [time], [look])
        for name, right, time in (("ew", 0.5, 2.0), ("uw", 0.4, 3.0))
    ]
    words = Report(alone, outcomes).words()
    assert (
        "- Delta_m is -5.0 (ew) to +1.7 (uw). Above 0, sharing a network made the tasks worse than "
        "a\n  network for each; below 0, better.\n"
        "- By task, the mean change for the worse is left +10.0 %, right +10.0 %, distance "
        "-25.0 %:\n  most of Delta_m comes from distance.\n"
        "- A step takes 1.00 (ew) to 1.50 (uw) times as long as with the plain sum, ew.\n"
    ) in words
    assert "- Delta_m is -5.0 (ew). Above 0" in Report(alone, outcomes[:1]).words()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (5, "0 of 3 epochs are trained, so there are no scores yet"),
        (12, "1 of 3 epochs are trained, with Delta_m % on the validation pictures: ew @, uw @"),
    ],
)
def test_an_interrupted_training_says_how_far_it_came(
    steps: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, step = iter(range(steps)), Balanced.step

    def counted(self: Balanced, batch: Batch, number: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        step(self, batch, number)

    monkeypatch.setattr(Balanced, "step", counted)
    wanted = re.escape(said).replace("@", r"[+-]\d+\.\d")
    with pytest.raises(KeyboardInterrupt, match=f"^{wanted}$"):
        run(Settings(rules=("uw",), epochs=3, out=tmp_path), copies=(2, 1, 1))


def test_weights_are_seen_where_a_rule_has_some(report: Report) -> None:
    last = {outcome.name: outcome.looks[-1].weights for outcome in report.outcomes}
    assert last.pop("graddrop") is None
    assert last["ew"] == dict.fromkeys(TASKS, 1.0)
    assert all(weights is not None and tuple(weights) == TASKS for weights in last.values())


@pytest.mark.slow
def test_pictures_are_png_files(report: Report, tmp_path: Path) -> None:
    files = draw(report, tmp_path)
    assert [file.name for file in files] == ["learning-curves.png", "weights-and-cosines.png"]
    for file in files:
        content = file.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert int.from_bytes(content[16:20], "big") > 1000  # width in pixels


@pytest.mark.slow
def test_same_seed_same_numbers(report: Report, tmp_path: Path) -> None:
    again = run(Settings(rules=RULES, epochs=2, seed=3, out=tmp_path), copies=COPIES)
    for ours, theirs in zip(report.outcomes, again.outcomes, strict=True):
        assert ours.validation == theirs.validation
        assert ours.test == theirs.test
        assert ours.looks == theirs.looks
    assert report.baseline == again.baseline


def test_test_pictures_are_used_once_per_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(model: TwoDigitNet, data: Problem, pictures: Split) -> Scores:
        sizes.append(len(pictures))
        return scores_of(model, data, pictures)

    monkeypatch.setattr(contest, "scores_of", counted)
    run(Settings(rules=("ew",), epochs=2, out=tmp_path), copies=(2, 1, 3))
    networks = len(TASKS) + 1
    assert sizes == [100] * 2 * networks + [300] * networks


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
