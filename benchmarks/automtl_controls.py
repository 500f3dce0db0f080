"""The controls that decide whether the search of AutoMTL matters, as cells to train.

A policy of several searches, splits or draws is trained once for each seed. What a task alone calls
shared is its own copy, so policies that differ only in that are one.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Generator

from arch_zoo import AutoMTL
from benchmarks.automtl_networks import (
    AFFINITY,
    COSTS,
    GIVEN,
    PERMUTED,
    PROBLEMS,
    SEARCHES,
    WIDE,
    Cell,
    Record,
    Records,
    Rows,
    alone_figures,
    of_size,
    supermodel,
    train,
)
from benchmarks.automtl_report import FOUND

SPLIT, SHUFFLED, SKIPPING = "split at ", "shuffled ", "equal skips "
WEIGHTS = tuple(name for name in SEARCHES if "weight" in name)
TRIED = (FOUND, *WEIGHTS, PERMUTED, COSTS, AFFINITY)
SHARED, SPECIFIC, SKIP = range(3)


def search_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return the searches, whose networks are trained later."""
    return [
        Cell(name, method, rule, seed, 0)
        for name in options.problems
        for rule in options.rules
        for method in TRIED
    ]


def network_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return the networks of the searches, of their controls, and hard sharing of equal size."""
    cells = []
    for name in options.problems:
        figures = alone_figures(name, seed, options.epochs, records)
        for rule in options.rules:
            cell = Cell(name, WIDE, rule, seed, options.epochs, figures)
            found = {method: records[Cell(name, method, rule, seed, 0)] for method in TRIED}
            size = found[FOUND].parameters
            policies = {method: as_rows(record.policy, name) for method, record in found.items()}
            policies |= controls(name, seed, policies[FOUND], size, options.policies)
            cells.append(replace(cell, size=size))
            cells += [
                replace(cell, method=method, policy=effective(rows))
                for method, rows in policies.items()
            ]
    return cells


def train_once(cell: Cell) -> Record:
    """Train a cell; a policy that was trained under another name is not trained again."""
    if not cell.policy:
        return train(cell)
    return replace(_trained(replace(cell, method=GIVEN)), cell=cell)


_trained = lru_cache(maxsize=None)(train)


def controls(problem: str, seed: int, found: Rows, size: int, draws: int) -> dict[str, Rows]:
    """Return the policies that need no search, by name.

    Args:
        problem: One of ``PROBLEMS``.
        seed: Of what is drawn.
        found: The policy of the search.
        size: How many parameters its network has.
        draws: Shuffled policies, and as many random ones with equal skips.

    Raises:
        RuntimeError: If no random policy has the size.
    """
    with torch.random.fork_rng(devices=[]):
        model = supermodel(PROBLEMS[problem](seed))
    operators, tasks = len(model.operators), len(model.tasks)
    policies: dict[str, Rows] = {
        f"{SPLIT}{n}": ((SHARED,) * n + (SPECIFIC,) * (operators - n),) * tasks
        for n in range(operators + 1)
    }
    for number in range(1, draws + 1):
        generator = Generator().manual_seed(1_000 * seed + number)
        policies[f"{SHUFFLED}{number}"] = shuffled(model, found, generator)
        draw = equal_skips(model, found, generator)
        policies[f"{SKIPPING}{number}"] = of_size(model, size, partial(next, draw))
    return policies


def shuffled(model: AutoMTL, found: Rows, generator: Generator) -> Rows:
    """Return a policy in which each task takes its own branches at other operators, by chance."""
    while True:
        places = [torch.randperm(len(row), generator=generator).tolist() for row in found]
        rows = tuple(
            tuple(row[place] for place in order) for row, order in zip(found, places, strict=True)
        )
        if all(model.policy.legal[n, branch] for row in rows for n, branch in enumerate(row)):
            return rows


def equal_skips(model: AutoMTL, found: Rows, generator: Generator) -> Iterator[Rows]:
    """Draw policies in which each task skips as often as found, and shares by a drawn chance."""
    able = model.policy.legal[:, SKIP].float()
    while True:
        chance = torch.rand((), generator=generator)
        rows = []
        for row in found:
            copied = (torch.rand(len(row), generator=generator) > chance).long()
            if skips := row.count(SKIP):
                copied[able.multinomial(skips, generator=generator)] = SKIP
            rows.append(tuple(copied.tolist()))
        yield tuple(rows)


def effective(rows: Rows) -> Rows:
    """Return a policy with what a task alone calls shared as the copy that it is."""
    alone = [column.count(SHARED) < 2 for column in zip(*rows, strict=True)]
    return tuple(
        tuple(
            SPECIFIC if branch == SHARED and single else branch
            for branch, single in zip(row, alone, strict=True)
        )
        for row in rows
    )


def as_rows(policy: Mapping[str, Sequence[int]], problem: str) -> Rows:
    """Return the rows of a policy in the order of the tasks of its problem."""
    return tuple(tuple(policy[task]) for task in PROBLEMS[problem](0).tasks)
