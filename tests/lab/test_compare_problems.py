"""The problems, on tiny files of their layouts: what all of them promise, and what each does."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny as files
import torch
from tiny import tiny
from torch import Tensor, nn

from gradbal import MTLOptimizer
from gradbal.lab.models.encoders import Embedded, dilated_resnet50, resnet18
from gradbal.lab.models.message_passing import MessagePassing
from gradbal.lab.problems import PROBLEMS, census, dense, load, molecules, multi_mnist, qm8, qm9
from gradbal.lab.problems.problem import Apart, Batch, Examples, Problem, Split, Stored
from gradbal.lab.problems.splitting import in_deviations, standardised
from gradbal.lab.training.loop import new_model

PUBLISHED_SPLITS = ("census", "celeba")
SIZES = {
    **{"two_digits": (200, 100, 100), "multi_mnist": (30, 10, 20), "mulan": (18, 6, 12)},
    **{"census": (16, 6, 8), "tox21": (16, 2, 2), "qm8": (16, 2, 2), "nyuv2": (6, 1, 3)},
    **{"cityscapes": (6, 1, 3), "office": (18, 6, 6), "celeba": (9, 2, 1), "qm9": (13, 4, 3)},
}


def splits(problem: Problem) -> tuple[Split, Split, Split]:
    return problem.train, problem.validation, problem.test


def inputs(split: Split) -> list[Tensor]:
    """Return the inputs of all examples, one by one."""
    batches = (batch.inputs for batch in split.batches(1))
    return [x for some in batches for x in (some.values() if isinstance(some, dict) else (some,))]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CONVOLUTIONS = ("celeba", "cityscapes", "nyuv2", "office")  # large networks


# ---------------------------------------------------------------------- laws of all problems


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            pytest.param(name, {}, marks=[pytest.mark.slow] * (name in CONVOLUTIONS), id=name)
            for name in PROBLEMS
        ),
        pytest.param("nyuv2", {"network": "resnet50"}, marks=pytest.mark.slow, id="nyuv2 resnet50"),
    ],
)
def test_a_model_of_the_parts_learns_and_is_scored(
    name: str, options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny(name, tmp_path, monkeypatch, **options)
    model = new_model(problem, "HPS", problem.tasks)
    mtl_opt = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=1e-3), "upgrad")
    batch = next(problem.train.batches(problem.batch, generator()))
    outputs = model(batch.inputs)
    assert outputs.keys() == batch.targets.keys() == problem.tasks.keys()
    losses = {
        task: what.loss(outputs[task], batch.targets[task]) for task, what in problem.tasks.items()
    }
    mtl_opt.step(losses)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(param.grad is not None for param in model.parameters())
    for task, what in problem.tasks.items():
        metric = what.metric()
        metric.update(outputs[task], batch.targets[task])
        assert metric.compute().keys() == what.higher.keys()
        assert what.select in what.higher


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_example_comes_once_in_one_split_and_seeds_draw_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny(name, tmp_path, monkeypatch)
    found = [inputs(split) for split in splits(problem)]
    assert tuple(map(len, found)) == SIZES[name]
    if name == "multi_mnist":  # its examples are pairs of what is split
        return
    several = [tuple(x.flatten().tolist()) for some in found for x in some]
    assert len(set(several)) == len(several)
    for seed, same in ((0, True), (1, name in PUBLISHED_SPLITS)):
        (tmp_path / str(seed)).mkdir()
        again = inputs(tiny(name, tmp_path / str(seed), monkeypatch, seed=seed).train)
        assert all(map(torch.equal, again, found[0])) is same


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_generator_draws_the_same_batches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tiny(name, tmp_path, monkeypatch).train
    first, again, other = (torch.cat(drawn(train, seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def drawn(split: Split, seed: int) -> list[Tensor]:
    batches = split.batches(4, generator(seed))
    return [y.flatten().nan_to_num() for batch in batches for y in batch.targets.values()]


# ---------------------------------------------------------------------- splits


def test_batches_in_training_are_a_shuffle_of_all_examples() -> None:
    split = Examples(torch.arange(10.0), {"a": torch.arange(10)})
    batches = list(split.batches(4, generator()))
    assert [len(batch.inputs) for batch in batches] == [4, 4, 2]
    order = torch.cat([batch.targets["a"] for batch in batches])
    assert order.tolist() != list(range(10))
    assert order.sort().values.tolist() == list(range(10))
    assert torch.equal(torch.cat([batch.inputs for batch in batches]), order.float())


def test_examples_are_changed_at_random_in_training_only() -> None:
    def read(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(float(number)), {"a": torch.tensor(number)}

    split = Stored(torch.tensor([3, 1, 2]), read, lambda x, y, _: (x + 10, y))
    (batch,) = split.batches(5)
    assert batch.inputs.tolist() == [3, 1, 2]
    (batch,) = split.batches(5, generator())
    assert torch.equal(batch.inputs, batch.targets["a"] + 10.0)


def test_small_tasks_are_repeated_in_training_and_end_early_otherwise() -> None:
    parts = {
        task: Examples(torch.arange(n), {task: torch.arange(n)}) for task, n in (("a", 7), ("b", 2))
    }
    split = Apart(parts)
    assert len(split) == 7
    seen: list[Batch] = list(split.batches(2, generator()))
    assert [len(batch.inputs["a"]) for batch in seen] == [2, 2, 2, 1]
    assert [sorted(batch.targets["b"].tolist()) for batch in seen] == [[0, 1]] * 4
    seen = list(split.batches(2))
    assert [list(batch.inputs) for batch in seen] == [["a", "b"], ["a"], ["a"], ["a"]]
    assert torch.cat([batch.targets["a"] for batch in seen]).tolist() == list(range(7))


# ---------------------------------------------------------------------- what each one does


def test_two_digits_are_standardised_and_scored_in_pixels() -> None:
    problem = load("two_digits", copies=(2, 1, 1))
    assert isinstance(problem.train, Examples)
    distance = problem.train.y["distance"]
    assert distance.mean().item() == pytest.approx(0, abs=1e-5)
    metric = problem.tasks["distance"].metric()
    metric.update(distance[:, None] + 1, distance)  # wrong by a deviation
    assert 1 < metric.compute()["mae"] < 4


def test_multi_mnist_overlays_digits_of_one_split(tmp_path: Path) -> None:
    problem = multi_mnist.load(files.multi_mnist(tmp_path), pairs=(60, 20, 20))
    for split in splits(problem):
        assert isinstance(split, Examples)
        assert split.x.shape[1:] == (1, 28, 28)
        assert torch.equal(split.x[:, 0, 0, 0].long(), split.y["left"])  # pixels are the labels
        assert torch.equal(split.x[:, 0, -1, -1].long(), split.y["right"])
        overlap = split.x[:, 0, 14, 14].long()
        assert torch.equal(overlap, torch.maximum(split.y["left"], split.y["right"]))
    (batch,) = problem.train.batches(60)
    assert torch.equal(batch.inputs, problem.train.x / 255)


def test_multi_mnist_learns_from_the_training_files_where_they_are(tmp_path: Path) -> None:
    files.multi_mnist(tmp_path, "train", n=7)  # labels 0 to 6 only
    problem = multi_mnist.load(files.multi_mnist(tmp_path), pairs=(60, 20, 60))
    known = torch.cat([problem.train.y["left"], problem.validation.y["left"]])
    assert known.max() == 6
    assert problem.test.y["left"].max() > 6


def test_mulan_is_standardised_by_its_training_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny("mulan", tmp_path, monkeypatch)
    assert problem.train.x.shape == (18, 4)  # two numbers, two words, not the constant column
    for column in (*problem.train.x.T, *problem.train.y.values()):
        assert column.mean().item() == pytest.approx(0, abs=1e-6)
        assert column.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    x, y = problem.train.x[:, :2], problem.train.y["target_0"]
    slopes = torch.linalg.lstsq(x, y[:, None]).solution  # the target is the sum of two inputs
    for split in splits(problem):
        metric = problem.tasks["target_0"].metric()
        metric.update(split.x[:, :2] @ slopes, split.y["target_0"])
        assert metric.compute()["rrmse"] < 1e-5


def test_equal_numbers_are_constant_whatever_their_mean_is_rounded_to() -> None:
    values = torch.tensor([[0.1, 1e-9 * i, 1e9 + i] for i in range(7)], dtype=torch.float64)
    assert values[:, 0].mean() != 0.1
    scaled = standardised(values, torch.arange(7))
    torch.testing.assert_close(scaled, torch.linspace(-1.5, 1.5, 7)[:, None].expand(7, 2))
    with pytest.raises(ValueError, match="got 'a' with one value there"):
        in_deviations("mine", ["a", "b", "c"], values, torch.arange(7))


def test_census_keeps_its_order_and_does_not_show_the_answers(tmp_path: Path) -> None:
    path = files.census_file(tmp_path / "census.gz")
    problem = census.load(path, sizes=(16, 6))
    assert list(problem.tasks) == ["income", "unmarried"]
    answers = torch.cat([split.y["income"] for split in splits(problem)])
    assert answers.tolist() == [float(i % 5 == 0) for i in range(30)]
    x = torch.cat([split.x for split in splits(problem)])
    assert x.shape == (30, census.FIELDS - 3)  # without weight and answers
    assert x[:16, :7].mean(dim=0) == pytest.approx(torch.zeros(7), abs=1e-6)
    assert (x[:, 7:] == x[:, 7:].round()).all()
    assert x[-1, 7:].min() == 0  # a word that training does not have
    assert x[:-1, 7:].min() == 1
    other = census.load(path, sizes=(16, 6), tasks=("college", "unmarried"))
    assert other.train.y["college"].tolist() == [float(i % 3 > 0) for i in range(16)]


def test_census_gives_each_word_of_each_column_a_vector() -> None:
    layer = Embedded(1, (2, 3), width=4)
    out = layer(torch.tensor([[0.5, 1, 0], [0.5, 0, 2]]))
    assert out.shape == (2, 9)
    assert torch.equal(out[:, 0], torch.tensor([0.5, 0.5]))
    assert torch.equal(out[0, 1:].view(2, 4), layer.table.weight[[1, 2]])
    assert torch.equal(out[1, 1:].view(2, 4), layer.table.weight[[0, 4]])


def test_missing_tests_of_molecules_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny("tox21", tmp_path, monkeypatch)
    labels = torch.cat([torch.stack([*split.y.values()], 1) for split in splits(problem)])
    assert labels.isnan().sum() == 20 * 12 / 4
    assert set(labels[~labels.isnan()].tolist()) == {0, 1}


def test_fingerprints_count_pieces_of_text() -> None:
    vector = np.expm1(molecules.fingerprint("CCO"))
    assert vector.sum() == pytest.approx(3 + 2 + 1)
    assert vector.max() == pytest.approx(2)  # C
    assert np.array_equal(molecules.fingerprint("CCO"), molecules.fingerprint("CCO"))
    assert not np.array_equal(molecules.fingerprint("CCO"), molecules.fingerprint("COC"))


def test_qm8_is_scored_in_its_own_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny("qm8", tmp_path, monkeypatch)
    y = problem.train.y["E1-CC2"]
    lengths = problem.train.x[:2].expm1().amax(dim=1).round() - 1  # the targets are their squares
    metric = problem.tasks["E1-CC2"].metric()
    metric.update(y[:1, None], y[1:2])
    wanted = (lengths[0] ** 2 - lengths[1] ** 2).abs().item()
    assert metric.compute()["mae"] == pytest.approx(wanted, rel=1e-5)


def test_what_was_not_measured_of_qm8_is_missing(tmp_path: Path) -> None:
    path = files.molecules(tmp_path / "a.csv", qm8.TASKS, lambda i, j: i if i % 5 else "")
    train = qm8.load(path).train
    assert isinstance(train, Examples)
    y = train.y["f1-CAM"]
    lengths = train.x.expm1().amax(dim=1).round() - 1
    assert torch.equal(y.isnan(), lengths % 5 == 0)
    assert y.nanmean().item() == pytest.approx(0, abs=1e-6)
    assert y.square().nanmean().item() == pytest.approx(1, abs=1e-6)


def test_pixels_without_label_are_missing_in_every_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny("nyuv2", tmp_path, monkeypatch)
    (batch,) = problem.test.batches(3)
    label, depth, normal = (batch.targets[task] for task in problem.tasks)
    assert batch.inputs.shape == normal.shape == (3, 3, 32, 64)
    assert (label.dtype, depth.dtype) == (torch.int64, torch.float32)
    missing = label < 0
    assert 0.2 < missing.float().mean() < 0.3
    assert torch.equal(depth.isnan(), missing)
    assert torch.equal(normal.isnan(), missing[:, None].expand_as(normal))
    depth_file = np.load(tmp_path / "val" / "depth" / "1.npy")
    np.testing.assert_array_equal(depth[1].nan_to_num(), depth_file[..., 0].astype(np.float32))
    normals = np.load(tmp_path / "val" / "normal" / "1.npy").astype(np.float32)
    np.testing.assert_array_equal(normal[1].nan_to_num().movedim(0, -1), normals)


def test_augmented_pictures_and_labels_stay_together() -> None:
    across = torch.arange(64.0).expand(32, 64)
    seen = set()
    for seed in range(30):
        labels = {
            "segmentation": across.long(),
            "depth": across + 1,
            "normal": torch.stack([across, 2 * across, 3 * across]),
        }
        x, y = dense.augmented(across.expand(3, 32, 64), labels, generator(seed))
        place = y["segmentation"]
        assert x.shape == (3, 32, 64)
        assert (x[0] - place).abs().max() <= 1  # the picture is blended, labels are not
        flipped = bool(place[0, -1] < place[0, 0])
        scale = (place + 1) / y["depth"]
        assert (scale.max() - scale.min()).item() < 1e-6
        assert torch.equal(y["normal"][0], place.float() * (-1 if flipped else 1))
        assert torch.equal(y["normal"][2], place * 3.0)
        width = place.max() - place.min() + 1
        assert abs(width * scale[0, 0] - 64) < 2
        seen.add((round(scale[0, 0].item(), 1), flipped))
    assert seen == {(scale, flipped) for scale in dense.SCALES for flipped in (True, False)}


def test_office_has_a_batch_for_each_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny("office", tmp_path, monkeypatch)
    assert list(problem.tasks) == ["amazon", "dslr"]
    assert [len(split) for split in splits(problem)] == [12, 4, 4]
    for batch in problem.train.batches(4, generator()):
        for task, x in batch.inputs.items():
            shade = 255 * (x[:, 0, 5, 5] * 0.229 + 0.485)
            assert torch.equal(((shade + 1) / 100).floor(), batch.targets[task])


def test_celeba_has_the_published_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny("celeba", tmp_path, monkeypatch)
    shades = [
        torch.cat([255 * batch.inputs[:, 0, 9, 9] for batch in split.batches(3)]) / 20
        for split in splits(problem)
    ]
    numbers = [some.round().long().tolist() for some in shades]
    assert numbers == [list(range(9)), [9, 10], [11]]
    (batch,) = problem.train.batches(9)
    assert batch.targets["Bald"].tolist() == [i % 2 for i in range(9)]
    assert batch.targets["Young"].tolist() == [float(i % 3 > 0) for i in range(9)]


# ---------------------------------------------------------------------- molecules as graphs


def test_messages_do_not_see_the_order_of_atoms_or_what_fills_the_tensor_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    molecule = files.QM9("")[3]
    model = MessagePassing(8, 3).double()
    order = torch.tensor([3, 0, 4, 1, 2])
    place = order.argsort()
    turned = torch.linalg.qr(torch.randn(3, 3, generator=generator()))[0]
    moved = type(molecule)(
        x=molecule.x[order],
        pos=molecule.pos[order] @ turned + 1,
        edge_index=place[molecule.edge_index],
        edge_attr=molecule.edge_attr,
    )
    with torch.no_grad():
        plain, larger, other = (
            model(qm9.packed(some, size).double()[None])
            for some, size in ((molecule, 5), (molecule, 7), (moved, 5))
        )
        molecule.edge_attr = molecule.edge_attr.roll(1, dims=1)
        changed = model(qm9.packed(molecule, 5).double()[None])
    torch.testing.assert_close(larger, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-6)  # places are float32
    assert not torch.allclose(changed, plain, rtol=0, atol=1e-4)


def test_qm9_is_scored_in_its_own_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = tiny("qm9", tmp_path, monkeypatch)
    molecules = torch.cat([molecule.y for molecule in files.QM9("")])
    (batch,) = problem.train.batches(20)
    for task, column, unit in (("mu", 0, 1), ("homo", 2, 1000), ("cv", 11, 1), ("u0", 12, 1000)):
        spread = molecules[problem.train.numbers, column].std(correction=0).item()
        metric = problem.tasks[task].metric()
        metric.update(batch.targets[task][:, None] + 1, batch.targets[task])
        assert metric.compute()["mae"] == pytest.approx(unit * spread, rel=1e-5)


def test_a_residual_block_halves_the_picture_where_it_widens() -> None:
    model = nn.Sequential(*(stage() for stage in resnet18()))
    assert sum(param.numel() for param in model.parameters()) == 11_176_512  # as published
    sizes = []
    x = torch.zeros(2, 3, 64, 64)
    for stage in model:
        x = stage(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512,)]


@pytest.mark.slow
def test_a_dilated_network_sees_what_the_strided_one_does_between_its_positions() -> None:
    torch.manual_seed(0)
    dilated = nn.Sequential(*(stage() for stage in dilated_resnet50())).eval()
    assert sum(param.numel() for param in dilated.parameters()) == 23_508_032  # as published
    strided = copy.deepcopy(dilated)
    for module in strided[3:].modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (1, 1)
    for path in ("3.0.body.3", "3.0.around.0", "4.0.body.3", "4.0.around.0"):
        strided.get_submodule(path).stride = (2, 2)  # type: ignore[assignment]  # of a convolution
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        seen, coarse = dilated(x), strided(x)
    assert (seen.shape, coarse.shape) == ((1, 2048, 8, 12), (1, 2048, 2, 3))
    torch.testing.assert_close(seen[..., ::4, ::4], coarse, rtol=1e-4, atol=1e-4)


def test_scenes_may_be_read_by_a_dilated_network_with_heads_of_deeplab(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = tiny("nyuv2", tmp_path, monkeypatch, network="resnet50")
    assert problem.batch == 8
    assert problem.published is not None
    assert problem.published.batch == 8
    x = torch.randn(2, 3, 32, 64)
    for stage in problem.stages:
        x = stage()(x)
    outputs = {task: make()(x).shape for task, make in problem.heads.items()}
    assert outputs == {
        "segmentation": (2, 13, 32, 64),
        "depth": (2, 1, 32, 64),
        "normal": (2, 3, 32, 64),
    }
    expected = r"^nyuv2: `network` must be one of 'segnet', 'resnet50', got 'vgg'\.$"
    with pytest.raises(ValueError, match=expected):
        load("nyuv2", tmp_path, network="vgg")
