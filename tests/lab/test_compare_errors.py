"""Wrong paths, broken files, missing columns: each gets one sentence."""

import gzip
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny as files
from tiny import FILES

from gradbal.lab.problems import PROBLEMS, WITH_PATH, load, tox21


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    content = path.read_bytes()
    packed = content.startswith(b"\x1f\x8b")
    text = change((gzip.decompress(content) if packed else content).decode())
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def save(path: Path, array: Any) -> None:
    np.save(path, array, allow_pickle=True)


IMAGES = "t10k-images-idx3-ubyte"
DENSE = "a folder with train and val, each with the folders image, label, depth"
CENSUS = "a file of Census-Income (KDD), census-income.data or .test, plain or gzipped"
MOLECULES = "a CSV file, plain or gzipped, with a column smiles and one column for each task"
CELEBA = "a folder with list_attr_celeba.txt, list_eval_partition.txt and the folder "
CELEBA += "img_align_celeba"
OFFICE = "a folder with one folder for each task, and in these, or in their images, one per class"
MNIST = f"a folder with {IMAGES} and t10k-labels-idx1-ubyte, plain or gzipped (.gz)"
Damage = Callable[[Path], object]
BROKEN: dict[str, list[tuple[Damage, str]]] = {
    "multi_mnist": [
        (
            lambda at: (at / f"{IMAGES}.gz").unlink(),
            f"multi_mnist: `path` must be {MNIST}; there is no '{IMAGES}.gz' in '@'.",
        ),
        (
            lambda at: cut(at / f"{IMAGES}.gz"),
            f"multi_mnist: `path` must be {MNIST}; '{IMAGES}.gz' cannot be read (Compressed file "
            "ended before the end-of-stream marker was reached).",
        ),
        (
            lambda at: cut(at / "t10k-labels-idx1-ubyte"),
            "multi_mnist: 't10k-labels-idx1-ubyte' must be bytes in the idx format with 1 axes; it "
            "is not, or is cut off. Copy the file again.",
        ),
        (
            lambda at: (at / "t10k-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0))),
            "multi_mnist: 't10k-labels-idx1-ubyte' must be bytes in the idx format with 1 axes; it "
            "is not, or is cut off. Copy the file again.",
        ),
        (
            lambda at: (at / f"{IMAGES}.gz").write_bytes(
                (at / "t10k-labels-idx1-ubyte").read_bytes()
            ),
            f"multi_mnist: '{IMAGES}.gz' must be bytes in the idx format with 3 axes; it is not, "
            "or is cut off. Copy the file again.",
        ),
        (
            lambda at: (at / "t10k-labels-idx1-ubyte").write_bytes(
                bytes((0, 0, 8, 1, 0, 0, 0, 2, 1, 1))
            ),
            "multi_mnist: pictures must have shape [2, 28, 28], one for each label, and labels be "
            "0 to 9; got [50, 28, 28] and labels up to 1.",
        ),
    ],
    "mulan": [
        (lambda at: at.unlink(), "tiny.arff: there is no such file."),
        (lambda at: at.write_text("none\n"), "tiny.arff: not an ARFF file of plain columns."),
        (
            lambda at: rewrite(at, lambda text: f"{text}?,1,7,red,1,1\n"),
            "tiny.arff: column c0 has missing values; fill them in first.",
        ),
        (
            lambda at: rewrite(at, lambda text: f"{text}1,1,7,?,1,1\n"),
            "tiny.arff: column colour has missing values; fill them in first.",
        ),
        (
            lambda at: rewrite(at, lambda text: re.sub(r",[^,]*,[^,]*\n", ",1,1\n", text)),
            "tiny.arff: a target must vary in the training part, got 'target_0' with one value "
            "there; choose another seed, or more examples.",
        ),
    ],
    "census": [
        (
            lambda at: at.unlink(),
            f"census: `path` must be {CENSUS}; there is no 'census.gz' in '@'.",
        ),
        (
            lambda at: at.write_bytes(bytes(range(128, 256))),
            f"census: `path` must be {CENSUS}; 'census.gz' holds no text.",
        ),
        (
            lambda at: rewrite(at, lambda text: f"{text}\n1, 2, 3"),
            f"census: `path` must be {CENSUS}; line 31 of 'census.gz' has 3 fields, not 42.",
        ),
        (
            lambda at: rewrite(at, lambda text: text.replace("7,", "seven,", 1)),
            "census: fields 0, 5, 16, 17, 18, 30, 39 must be numbers; could not convert string to "
            "float: 'seven'.",
        ),
        (
            lambda at: rewrite(at, lambda text: "\n".join(text.splitlines()[:22])),
            "census: `sizes` must leave rows for test; 'census.gz' has 22, and 22 are for training "
            "and validation.",
        ),
    ],
    "tox21": [
        (lambda at: at.unlink(), f"tox21: `path` must be {MOLECULES}; there is no 'a.csv' in '@'."),
        (
            lambda at: rewrite(at, lambda text: text.replace("SR-p53", "p53")),
            f"tox21: 'a.csv' must have the columns smiles, {', '.join(tox21.TASKS)}; it lacks "
            "SR-p53.",
        ),
        (
            lambda at: rewrite(at, lambda text: text.replace(",0", ",no", 1)),
            "tox21: 'a.csv' must have a number or nothing in every field of a task; line 2 does "
            "not.",
        ),
        (
            lambda at: rewrite(at, lambda text: text.splitlines()[0]),
            "tox21: 'a.csv' must have at least one row.",
        ),
    ],
    "qm8": [
        (
            lambda at: cut(at),
            f"qm8: `path` must be {MOLECULES}; 'a.csv.gz' cannot be read (Compressed file ended "
            "before the end-of-stream marker was reached).",
        ),
        (
            lambda at: rewrite(at, lambda text: f"{text}\nC,1"),
            "qm8: 'a.csv.gz' must have a number or nothing in every field of a task; line 22 does "
            "not.",
        ),
    ],
    "nyuv2": [
        (
            lambda at: shutil.rmtree(at / "val" / "normal"),
            f"nyuv2: `path` must be {DENSE}, normal; there is no 'normal' in '@/val'.",
        ),
        (
            lambda at: (at / "train" / "label" / "3.npy").unlink(),
            "nyuv2: every folder of '@/train' must have the arrays 0.npy to 6.npy; 'label' has no "
            "3.npy.",
        ),
        (
            lambda at: save(at / "val" / "depth" / "0.npy", np.array([{}, None])),
            "nyuv2: '@/val/depth/0.npy' must be an array of numbers in NumPy's format; it cannot "
            "be read. Copy the file again.",
        ),
        (
            lambda at: save(at / "val" / "image" / "0.npy", np.zeros((3, 32, 64))),
            "nyuv2: '@/val/image/0.npy' must have shape [any, any, 3], got [3, 32, 64].",
        ),
        (
            lambda at: save(at / "val" / "label" / "0.npy", np.zeros((32, 32))),
            "nyuv2: '@/val/label/0.npy' must have shape [32, 64], got [32, 32].",
        ),
        (
            lambda at: save(at / "val" / "label" / "0.npy", np.full((32, 64), 13)),
            "nyuv2: classes must be below 13, or negative where there is none; "
            "'@/val/label/0.npy' has 13.",
        ),
    ],
    "cityscapes": [
        (
            lambda at: shutil.rmtree(at),
            f"cityscapes: `path` must be {DENSE}; there is no 'image' in '@/train'.",
        ),
    ],
    "office": [
        (
            lambda at: (shutil.rmtree(at), at.touch()),
            f"office: `path` must be {OFFICE}, at least two tasks with the same classes, got none.",
        ),
        (
            lambda at: shutil.rmtree(at),
            f"office: `path` must be {OFFICE}; there is no '@name' in '@parent'.",
        ),
        (
            lambda at: shutil.rmtree(at / "dslr"),
            f"office: `path` must be {OFFICE}, at least two tasks with the same classes, got "
            "amazon with 2.",
        ),
        (
            lambda at: shutil.rmtree(at / "dslr" / "mug"),
            f"office: `path` must be {OFFICE}, at least two tasks with the same classes, got "
            "amazon with 2, dslr with 1.",
        ),
        (
            lambda at: [file.unlink() for file in at.glob("dslr/*/frame_[1-4].png")],
            "office: 'dslr' must have at least five pictures (.jpg, .jpeg, .png), got 2.",
        ),
        (
            lambda at: [file.write_text("no") for file in at.glob("amazon/images/bike/*_0.png")],
            "office: '@/amazon/images/bike/frame_0.png' must be a picture; it cannot be read.",
        ),
    ],
    "celeba": [
        (
            lambda at: shutil.rmtree(at / "img_align_celeba"),
            f"celeba: `path` must be {CELEBA}; there is no 'img_align_celeba' in '@'.",
        ),
        (
            lambda at: rewrite(
                at / "list_attr_celeba.txt", lambda text: text.replace("-1", "0", 1)
            ),
            "celeba: 'list_attr_celeba.txt' must have 1 or -1 for each of the 2 attributes; the "
            "line of '000001.png' does not.",
        ),
        (
            lambda at: (at / "list_attr_celeba.txt").write_text("12\n"),
            f"celeba: `path` must be {CELEBA}; 'list_attr_celeba.txt' has no line for a picture.",
        ),
        (
            lambda at: rewrite(
                at / "list_eval_partition.txt", lambda text: text.replace("000003.png 0\n", "")
            ),
            "celeba: 'list_eval_partition.txt' must have 0, 1 or 2 for every picture; it has none "
            "of them for '000003.png'.",
        ),
    ],
    "qm9": [
        (
            lambda at: shutil.rmtree(at / "raw"),
            "qm9: `path` must be the root of PyTorch Geometric's QM9, a folder that has its files "
            "in raw, got '@'; nothing is downloaded.",
        ),
    ],
}
CASES = [
    pytest.param(name, damage, told, id=f"{name}-{number}")
    for name, damages in BROKEN.items()
    for number, (damage, told) in enumerate(damages)
]


@pytest.mark.parametrize(("name", "damage", "told"), CASES)
def test_what_is_broken_is_told(
    name: str, damage: Damage, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, options = FILES[name](tmp_path, monkeypatch)
    damage(path)
    folder = path.parent if path.suffix else path
    sentence = told.replace("@name", folder.name).replace("@parent", str(folder.parent))
    sentence = sentence.replace("@", str(folder))
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):  # noqa: PT012
        problem = load(name, path, **options)
        for split in (problem.train, problem.validation, problem.test):
            list(split.batches(2))


def test_every_problem_with_files_is_broken_above() -> None:
    assert BROKEN.keys() == WITH_PATH.keys()


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("two_digits", "sklearn", "scikit-learn"),
        ("mulan", "scipy.io", "scipy"),
        ("office", "PIL.Image", "pillow"),
        ("celeba", "PIL.Image", "pillow"),
        ("qm9", "torch_geometric.datasets", "torch_geometric"),
    ],
)
def test_a_missing_package_is_told(
    name: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = None if name == "two_digits" else FILES[name](tmp_path, monkeypatch)[0]
    monkeypatch.setitem(sys.modules, module, None)
    owner = "tiny.arff" if name == "mulan" else name
    sentence = f"{owner}: needs {package}; run `pip install {package}`."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load(name, path)


def test_what_cannot_be_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    census, _ = FILES["census"](tmp_path, monkeypatch)
    mulan = files.mulan(tmp_path / "tiny.arff")
    qm9, _ = FILES["qm9"](tmp_path / "qm9", monkeypatch)
    cases: list[tuple[str, Path | None, dict[str, Any], str]] = [
        (
            "tox12",
            None,
            {},
            "gradbal compare: unknown problem 'tox12'. Did you mean 'tox21'? There are "
            f"{', '.join(PROBLEMS)}.",
        ),
        (
            "qm8",
            None,
            {},
            "qm8: `path` must say where its files are, got none; they are not downloaded.",
        ),
        (
            "mulan",
            mulan,
            {},
            "tiny.arff: `targets` must be from 1 to 6, its columns less one, got none.",
        ),
        (
            "mulan",
            mulan,
            {"targets": 7},
            "tiny.arff: `targets` must be from 1 to 6, its columns less one, got 7.",
        ),
        (
            "census",
            census,
            {"tasks": ("income", "age"), "sizes": (16, 6)},
            "census: `tasks` must be among income, college, unmarried, got 'age'.",
        ),
        (
            "qm9",
            qm9,
            {"sizes": (10, 10)},
            "qm9: `sizes` must leave molecules for training; there are 20, and 20 are for "
            "validation and test.",
        ),
    ]
    for name, path, options, sentence in cases:
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            load(name, path, **options)


def test_what_pytorch_geometric_cannot_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = FILES["qm9"](tmp_path, monkeypatch)
    monkeypatch.setattr(files.QM9, "__init__", lambda self, root: 1 / 0)
    sentence = f"qm9: PyTorch Geometric cannot read its QM9 in '{path}' (division by zero)."
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        load("qm9", path)
