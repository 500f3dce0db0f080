"""What is shipped: wheel and sdist, installed elsewhere, run there and seen by mypy."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ["gradbal", "arch_zoo", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"]
SCRIPT = """
import torch
import arch_zoo
import gradbal

model = torch.nn.Linear(2, 2)
optimizer = gradbal.MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), "upgrad")
optimizer.step(list(model(torch.ones(1, 2)).square().mean(dim=0)))
print(gradbal.__file__)
"""
TYPED = """
import torch
from gradbal import MTLOptimizer, aggregate, make_rule

model = torch.nn.Linear(2, 2)
optimizer = MTLOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), make_rule("cagrad", c=0.2))
optimizer.step({"a": model(torch.ones(2)).sum()})
direction: torch.Tensor = aggregate(torch.eye(2), "mgda").direction
reveal_type(optimizer.metrics())
optimizer.end_epoch("one")
"""


def run(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy; the wheel is made from the sdist, so nothing may be missing there."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SHIPPED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--outdir", out, source, cwd=source)
    return out


@pytest.fixture(scope="module")
def elsewhere(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the Python of an environment with the wheel; torch is that of this one."""
    home = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "torch_is_here.pth").write_text(sysconfig.get_paths()["purelib"])
    python = home / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "--no-index", "--no-deps", wheel, cwd=home)
    return python


def test_what_is_in_them(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"gradbal", "arch_zoo"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    for package in ("gradbal", "arch_zoo"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py")}
        wanted = modules | {f"{package}/py.typed"}
        assert wanted <= set(names)
        assert wanted <= inside
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"} <= inside
    assert not [name for name in names if {"tests", "conftest.py"} & {*name.split("/")}]


def test_installing_it_needs_torch_and_numpy_only(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needed = message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    plain = {re.split(r"[^\w-]", line)[0] for line in needed if "extra ==" not in line}
    assert plain == {"torch", "numpy"}


def test_a_package_index_can_show_the_readme(built: Path) -> None:
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)
    assert said.count("PASSED") == 2


def test_it_runs_elsewhere(elsewhere: Path, tmp_path: Path) -> None:
    where = run(elsewhere, "-c", SCRIPT, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(elsewhere.parents[1])
    command = elsewhere.with_name("gradbal")
    assert "upgrad" in run(command, "list", cwd=tmp_path)
    text = run(command, "demo", "--epochs", 1, "--rules", "ew,upgrad", cwd=tmp_path)
    assert "upgrad" in text
    assert len(list((tmp_path / "gradbal-demo").iterdir())) == 2


def test_mypy_sees_its_types(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(elsewhere)]
    done = subprocess.run(
        [*command, "--no-error-summary", "script.py"], cwd=tmp_path, capture_output=True, text=True
    )
    note, error = done.stdout.strip().splitlines()
    assert 'Revealed type is "dict[str, torch._tensor.Tensor]"' in note
    assert error.startswith("script.py:10: error: Too many arguments")
