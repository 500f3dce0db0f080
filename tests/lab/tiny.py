"""Tiny files of the layouts that the problems have, written where a test wants them."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gradbal.lab.problems import census, load, qm8, tox21
from gradbal.lab.problems.problem import Problem

DRAW = np.random.default_rng


def multi_mnist(path: Path, part: str = "t10k", n: int = 50) -> Path:
    """Write digits of which every pixel is the label."""
    labels = (np.arange(n) % 10).astype(np.uint8)
    images = np.repeat(labels, 28 * 28)
    path.mkdir(exist_ok=True)
    sizes = np.array([n, 28, 28], ">u4").tobytes()
    head = bytes((0, 0, 8, 3)) + sizes
    (path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    head = bytes((0, 0, 8, 1)) + sizes[:4]
    (path / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return path


def mulan(path: Path) -> Path:
    """Write two columns of numbers, a constant one, one of words, and two targets."""
    head = ["@relation tiny", *(f"@attribute c{i} numeric" for i in range(3))]
    head += ["@attribute colour {red,blue}", "@attribute y0 numeric", "@attribute y1 numeric"]
    rows = [
        f"{a},{b},7,{'red' if a > 0 else 'blue'},{a + b},{i}"
        for i, (a, b) in enumerate(DRAW(0).normal(size=(36, 2)))
    ]
    path.write_text("\n".join([*head, "@data", *rows]) + "\n")
    return path


def census_rows(n: int = 30) -> list[list[str]]:
    """Return people whose age is their number; the last one has a job that nobody else has."""
    rows = []
    for i in range(n):
        row = [f"word {(i + place) % 3}" for place in range(census.FIELDS)]
        for place in (*census.NUMBERS, census.WEIGHT):
            row[place] = str(i)
        row[census.INCOME] = "50000+." if i % 5 == 0 else "- 50000."
        row[census.MARITAL] = "Never married" if i % 2 else "Widowed"
        row[census.EDUCATION] = census.COLLEGE[0] if i % 3 else "Children"
        rows.append(row)
    rows[-1][1] = "astronaut"
    return rows


def census_file(path: Path) -> Path:
    path.write_bytes(gzip.compress("\n".join(map(", ".join, census_rows())).encode()))
    return path


def molecules(path: Path, tasks: tuple[str, ...], values: Callable[[int, int], object]) -> Path:
    lines = [",".join(("smiles", *tasks))]
    for i in range(20):
        lines.append(",".join(("C" * (i + 1), *(str(values(i, j)) for j in range(len(tasks))))))
    content = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def dense(path: Path, kinds: tuple[str, ...], classes: int) -> Path:
    """Write seven pictures for training and three for test; a quarter of the labels is missing."""
    draw = DRAW(0)
    axes = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}
    for part, n in (("train", 7), ("val", 3)):
        for number in range(n):
            missing = draw.random((32, 64)) < 0.25
            for kind in kinds:
                array = draw.random((32, 64, *axes[kind])) + 0.1
                if kind == "label":
                    array = draw.integers(classes, size=(32, 64)).astype(float)
                if kind != "image":
                    array[missing] = -1 if kind == "label" else 0
                place = path / part / kind
                place.mkdir(parents=True, exist_ok=True)
                np.save(place / f"{number}.npy", array)
    return path


def picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9, 7, 3), value, np.uint8)).save(path)


def office(path: Path) -> Path:
    """Write two ways to picture two things; the shade tells which picture it is."""
    for task, inside, n in (("amazon", "images", 10), ("dslr", ".", 5)):
        for label, name in enumerate(("bike", "mug")):
            for number in range(n):
                file = path / task / inside / name / f"frame_{number}.png"
                picture(file, 100 * label + 10 * number + (task == "dslr"))
    return path


def celeba(path: Path) -> Path:
    names = [f"{number:06}.png" for number in range(1, 13)]
    for shade, name in enumerate(names):
        picture(path / "img_align_celeba" / name, 20 * shade)
    lines = [f"{name}  {1 if i % 2 else -1} {1 if i % 3 else -1}" for i, name in enumerate(names)]
    (path / "list_attr_celeba.txt").write_text("\n".join(["12", "Bald Young", *lines]) + "\n")
    parts = [f"{name} {max(0, i - 7) // 2}" for i, name in enumerate(names)]
    (path / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return path


class QM9(list[Any]):
    """Stands in for PyTorch Geometric's; molecules are chains of 2 to 5 atoms."""

    def __init__(self, root: str) -> None:
        draw = torch.Generator().manual_seed(0)
        for number in range(20):
            n = 2 + number % 4
            ends = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
            self.append(
                SimpleNamespace(
                    x=1 + torch.rand(n, 11, generator=draw),
                    pos=torch.randn(n, 3, generator=draw),
                    y=torch.randn(1, 19, generator=draw),
                    edge_index=torch.cat([ends, ends.flip(0)], dim=1),
                    edge_attr=torch.eye(4)[torch.arange(n - 1) % 4].repeat(2, 1),
                )
            )


def qm9(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (path / "raw").mkdir(parents=True)
    (path / "raw" / "qm9_v3.pt").touch()
    module = ModuleType("torch_geometric.datasets")
    module.QM9 = QM9  # type: ignore[attr-defined]  # a stand-in
    monkeypatch.setitem(sys.modules, "torch_geometric", ModuleType("torch_geometric"))
    monkeypatch.setitem(sys.modules, "torch_geometric.datasets", module)
    return path


def tiny(name: str, path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Problem:
    """Write the files of a problem in a folder and load it."""
    if name == "two_digits":
        return load(name, **{"copies": (2, 1, 1), **options})
    place, defaults = FILES[name](path, monkeypatch)
    return load(name, place, **{**defaults, **options})


Written = tuple[Path, dict[str, Any]]
FILES: dict[str, Callable[[Path, pytest.MonkeyPatch], Written]] = {
    "multi_mnist": lambda path, _: (multi_mnist(path), {"pairs": (30, 10, 20)}),
    "mulan": lambda path, _: (mulan(path / "tiny.arff"), {"targets": 2}),
    "census": lambda path, _: (census_file(path / "census.gz"), {"sizes": (16, 6)}),
    "tox21": lambda path, _: (
        molecules(path / "a.csv", tox21.TASKS, lambda i, j: "" if (i + j) % 4 == 0 else i * j % 2),
        {},
    ),
    "qm8": lambda path, _: (molecules(path / "a.csv.gz", qm8.TASKS, lambda i, j: i * i - j), {}),
    "nyuv2": lambda path, _: (dense(path, ("image", "label", "depth", "normal"), 13), {}),
    "cityscapes": lambda path, _: (dense(path, ("image", "label", "depth"), 7), {}),
    "office": lambda path, _: (office(path), {"side": 32}),
    "celeba": lambda path, _: (celeba(path), {}),
    "qm9": lambda path, patch: (qm9(path, patch), {"sizes": (4, 3)}),
}
