"""Processes with parts of a batch do what one process does with the whole batch."""

from typing import Any

import pytest
import torch
from distributed.pool import Pool
from distributed.training import largest_gap, train

from gradbal.jacobian.engines import Batched, Streaming

KINDS = ["ew", "famo", "upgrad", "nash_mtl", "graddrop", "moco"]  # losses, Gram, entries; state
ENGINES = [
    "auto",
    "sequential",
    Batched(chunk_size=2),
    "factored",
    Streaming(segments=3),
    "sketched",
]
LOOKS = ["representation", "named"]
SPREADS = ["ddp", "plain", "fsdp", "fsdp_kept", "tp"]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}


def check_equal(pool: Pool, dtype: torch.dtype = torch.float64, **options: Any) -> None:
    """Train alone and in the pool, and compare."""
    options = {"steps": 3, "dtype": dtype, **options}
    alone = train(**options)
    many = pool(train, **options)
    for one in many:
        assert largest_gap(alone, one) < TOLERANCE[dtype]
        assert one["grads"] == alone["grads"]
        for ours, theirs in zip(one["parameters"], many[0]["parameters"], strict=True):
            assert torch.equal(ours, theirs), "the processes' models differ"


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("rule", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_twenty_steps_of_two_processes_equal_those_of_one(
    how: str, rule: str, dtype: torch.dtype, two: Pool
) -> None:
    check_equal(two, dtype, rule=rule, how=how, steps=20, lr=0.02)


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_every_engine(how: str, engine: Any, two: Pool) -> None:
    # a sketch is drawn anew in every step, but here rows are formed
    check_equal(two, engine=engine, how=how)


@pytest.mark.parametrize("how", SPREADS)
@pytest.mark.parametrize("engine", LOOKS)
def test_a_representation(how: str, engine: Any, two: Pool) -> None:
    check_equal(two, engine=engine, how=how, pair="fsdp" not in how)


@pytest.mark.parametrize("how", ["ddp", "fsdp", "tp", "fsdp_tp"])
@pytest.mark.parametrize("rule", KINDS)
def test_four_processes(how: str, rule: str, four: Pool) -> None:
    check_equal(four, rule=rule, how=how, steps=20, lr=0.02)


@pytest.mark.parametrize("how", ["ddp", "fsdp_tp"])
@pytest.mark.parametrize("engine", [*ENGINES, *LOOKS], ids=str)
def test_every_engine_in_four_processes(how: str, engine: Any, four: Pool) -> None:
    check_equal(four, engine=engine, how=how, pair=how == "ddp" or engine not in LOOKS)


@pytest.mark.parametrize("how", ["ddp", "plain", "fsdp", "tp"])
@pytest.mark.parametrize(
    "options",
    [
        {"aux": True},
        {"rule": "ew", "aux": True},
        {"pieces": 2},
        {"update_every": 2, "steps": 4},
        {"update_every": 2, "steps": 4, "heads": "weighted"},
        {"groups": "tensor"},
        {"rule": "db_mtl"},
        {"rule": "m_config", "steps": 5},
    ],
    ids=str,
)
def test_every_way_of_stepping(how: str, options: dict[str, Any], two: Pool) -> None:
    check_equal(two, how=how, **options)


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize("rule", ["ew", "upgrad", "graddrop"])
def test_sparse_gradients_of_an_embedding(how: str, rule: str, two: Pool) -> None:
    check_equal(two, rule=rule, how=how, sparse=True)


@pytest.mark.parametrize("how", ["ddp", "plain", "fsdp"])
@pytest.mark.parametrize("rule", ["dwa", "cagrad"])
def test_parts_of_different_size(how: str, rule: str, two: Pool) -> None:
    check_equal(two, rule=rule, how=how, ends=[5, 16], counts=True)


@pytest.mark.parametrize("how", ["ddp", "plain"])
@pytest.mark.parametrize(
    ("rule", "engine"),
    [
        ("dwa", "auto"),
        ("graddrop", "auto"),
        ("cagrad", "sequential"),
        ("cagrad", "streaming"),
        ("cagrad", "batched"),
        ("cagrad", "auto"),
    ],
)
def test_tasks_that_some_processes_lack(how: str, rule: str, engine: str, two: Pool) -> None:
    missing = (("a", 0), ("a", 1), ("c", 3))
    check_equal(two, rule=rule, engine=engine, how=how, missing=missing, counts=True)


@pytest.mark.parametrize("engine", ["named", "streaming", "sequential"])
def test_a_process_without_any_loss(engine: str, four: Pool) -> None:
    nowhere = tuple((name, 2) for name in "abc")
    check_equal(four, rule="cagrad", engine=engine, how="plain", missing=nowhere, counts=True)
