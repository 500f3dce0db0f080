"""What every test shares: seeding, one thread per worker, and which tests are slow.

A push runs a sample of the exhaustive grids: one rule of each kind, and a handful of awkward task
gradients. ``pytest -m "slow or not slow"`` runs everything.
"""

import gc
import os
from collections import defaultdict

import pytest
import torch
from hypothesis import settings

settings.register_profile("seeded", derandomize=True, deadline=None, database=None)
settings.load_profile("seeded")
collect_ignore_glob = ["*/conftest.py"]  # no doctests, and one name for several modules
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# One rule of each kind: none, on losses (stateless, stateful, learning, observing), on the Gram
# matrix (plain, random, stateful, with weighted heads, spectral), on norms, on gradients (with
# buffers, elementwise, with heads of their own).
KINDS = {
    *("ew", "gls", "dwa", "uw", "famo", "upgrad", "pcgrad", "gradvac", "nash_mtl", "aligned_mtl"),
    *("gradnorm", "imtl", "moco", "db_mtl", "graddrop"),
}
GRID = 20  # rules from which on a test counts as one over all rules


@pytest.fixture(autouse=True)
def _nothing_draws_from_the_global_generator() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later garbage collection, a tenth of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests over all rules as slow, but for one rule of each kind.

    Tests of rules themselves, in ``tests/rules``, choose for themselves.
    """
    from gradbal import rule_names

    names = set(rule_names())
    rules_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    found: list[tuple[pytest.Item, tuple[str, str], str]] = []
    for item in items:
        spec = getattr(item, "callspec", None)
        given = [] if spec is None else [v for v in spec.params.values() if isinstance(v, str)]
        rule = next((value for value in given if value in names), None)
        if rule is not None and "rules" not in item.path.parts:
            test = (str(item.path), item.originalname)  # type: ignore[attr-defined]  # a function
            rules_of[test].add(rule)
            found.append((item, test, rule))
    for item, test, rule in found:
        if len(rules_of[test]) >= GRID and rule not in KINDS:
            item.add_marker(pytest.mark.slow)
    for item in items:
        if "distributed" in item.path.parts:
            _mark_ranks(item)


def _mark_ranks(item: pytest.Item) -> None:
    """Let one worker run all tests with several ranks; four ranks on two cores are slow."""
    item.add_marker(pytest.mark.xdist_group("ranks"))  # they share the processes that they start
    spec = getattr(item, "callspec", None)
    values = [] if spec is None else list(spec.params.values())
    if "four" in getattr(item, "fixturenames", ()) or 4 in values or torch.float32 in values:
        item.add_marker(pytest.mark.slow)
