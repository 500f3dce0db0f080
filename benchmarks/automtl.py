"""Whether AutoMTL finds a better network than hard sharing, other architectures, and chance.

``python -m benchmarks.automtl --help``, from the root of the repository.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from benchmarks import automtl_controls as controls
from benchmarks import automtl_controls_report
from benchmarks import options as opts
from benchmarks.automtl_networks import (
    METHODS,
    PROBLEMS,
    Cell,
    Record,
    Records,
    alone_figures,
    train,
)
from benchmarks.automtl_report import FOUND, RANDOM, page
from gradbal import rule_names
from gradbal.lab.training import resume
from gradbal.lab.training.loop import ALONE


def alone_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return the tasks alone, against which epochs are chosen."""
    return [
        Cell(name, ALONE, task, seed, options.epochs)
        for name in options.problems
        for task in PROBLEMS[name](seed).tasks
    ]


def method_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return the methods, which need the records of the tasks alone."""
    cells = []
    for name in options.problems:
        against = alone_figures(name, seed, options.epochs, records)
        cells += [
            Cell(name, method, rule, seed, options.epochs, against)
            for rule in options.rules
            for method in options.methods
        ]
    return cells


def random_cells(seed: int, records: Records, options: argparse.Namespace) -> list[Cell]:
    """Return random policies, of the size of those that were found."""
    return [
        replace(cell, method=f"{RANDOM}{number}", size=record.parameters)
        for cell, record in records.items()
        if cell.method == FOUND and cell.seed == seed
        for number in range(1, options.policies + 1)
    ]


CONTEST = (method_cells, random_cells), train, page
CONTROLS = (
    (controls.search_cells, controls.network_cells),
    controls.train_once,
    automtl_controls_report.page,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a cell failed."""
    options = parse(arguments)
    records: dict[Cell, Record] = {}
    if options.controls:
        parts, work, write = CONTROLS
    else:
        parts, work, write = CONTEST
    for seed in options.seeds:
        for cells in (alone_cells, *parts):
            found, failures = resume.run(
                cells(seed, records, options), options.out, work, Record, jobs=options.jobs
            )
            records |= found
            if failures:
                for cell, reason in failures.items():
                    print(f"FAILED {cell}: {reason}", file=sys.stderr)
                return 1
    given = sys.argv[1:] if arguments is None else arguments
    command = f"python -m benchmarks.automtl {shlex.join(given)}".strip()
    problems = {name: PROBLEMS[name](0).tasks for name in options.problems}
    text = write(records, problems, options, command)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.automtl", description=__doc__)
    known, default = [*PROBLEMS], ["ew", "upgrad"]
    parser.add_argument("--problems", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--rules", nargs="+", choices=rule_names(), default=default, metavar="RULE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), metavar="SEED")
    parser.add_argument("--epochs", type=opts.positive, default=10, help="default: %(default)s")
    parser.add_argument(
        "--policies", type=opts.positive, default=3, help="random ones (default: %(default)s)"
    )
    parser.add_argument(
        "--controls",
        action="store_true",
        help="compare searches with each other and with policies that need no search, in place of "
        "--methods; --policies says how many are drawn of each kind",
    )
    opts.add_options(parser, "automtl", "docs/results")
    options = parser.parse_args(arguments)
    if len(set(options.seeds)) < 2:
        parser.error("--seeds: an interval needs two different ones")
    return options


if __name__ == "__main__":
    sys.exit(main())
