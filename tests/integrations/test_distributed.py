"""Two processes under Accelerate, Lightning and transformers equal one on the joined batch."""

from pathlib import Path
from typing import Any

import pytest
from distributed.pool import Pool
from integrations import with_accelerate, with_lightning, with_transformers
from integrations.halves import by_hand
from models import assert_same

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to turn into errors
RULES = ["uw", "upgrad", "graddrop"]  # on losses, on the Gram matrix, on entries
HOW = ["ddp", "fsdp2"]
PIECES: list[dict[str, Any]] = [{}, {"pieces": 2}, {"pieces": 2, "accumulate": True}]


def check(pool: Pool, function: Any, *args: Any, alone: dict[str, Any], **options: Any) -> None:
    """Train in one process and in both, and compare the parameters."""
    wanted = by_hand(args[0], **alone)
    for found in pool(function, *args, **options):
        assert_same(found, wanted, 1e-10)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", PIECES, ids=str)
def test_accelerate(how: str, rule: str, options: dict[str, Any], two: Pool) -> None:
    # Accelerate steps a schedule once for each process
    check(two, with_accelerate.train, rule, how, alone=options | {"ticks": 2}, **options)


@pytest.mark.parametrize("rule", RULES)
def test_pieces_that_ddp_does_not_reduce(rule: str, two: Pool) -> None:
    options = {"pieces": 2, "sync": False}
    check(two, with_accelerate.train, rule, "ddp", alone={"pieces": 2, "ticks": 2}, **options)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", ["uw", "nash_mtl", "pcgrad"])
def test_accelerate_resumes(how: str, rule: str, two: Pool, tmp_path: Path) -> None:
    check(two, with_accelerate.resume, rule, how, str(tmp_path), alone={"ticks": 2})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"pieces": 2}, {"automatic": False}], ids=str)
def test_trainer(how: str, rule: str, options: dict[str, Any], two: Pool, tmp_path: Path) -> None:
    alone = {"pieces": options.get("pieces", 1)}
    check(two, with_lightning.train, rule, how, str(tmp_path), alone=alone, **options)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", ["uw", "nash_mtl", "pcgrad"])
def test_trainer_resumes(how: str, rule: str, two: Pool, tmp_path: Path) -> None:
    check(two, with_lightning.resume, rule, how, str(tmp_path), alone={})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", RULES)
def test_fabric(how: str, rule: str, two: Pool, tmp_path: Path) -> None:
    check(two, with_lightning.with_fabric, rule, how, str(tmp_path / "middle"), alone={})


@pytest.mark.parametrize("rule", RULES)
def test_trainer_of_transformers(rule: str, two: Pool, tmp_path: Path) -> None:
    wanted = with_transformers.by_hand(rule, 2)
    for found in two(with_transformers.train, rule, str(tmp_path)):
        assert_same(found, wanted, 1e-5)
