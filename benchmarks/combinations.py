"""Train every rule with every architecture on two real problems, and make one table.

``python -m benchmarks.combinations --help``, from the root of the repository.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # found also when this is run as a script

from benchmarks import options as opts
from benchmarks.cells import Cell, Record, cells_of, train
from benchmarks.problems import PROBLEMS
from benchmarks.tables import heading, render
from gradbal.lab.models.architectures import ARCHITECTURES
from gradbal.lab.training import resume

RULES = (
    *("ew", "uw", "gradnorm", "mgda", "dwa", "gls", "graddrop", "pcgrad", "gradvac", "imtl"),
    *("cagrad", "rlw", "upgrad", "nash_mtl", "famo"),
)


def run(
    cells: Sequence[Cell], path: Path, *, jobs: int = 1, quiet: bool = False
) -> tuple[dict[Cell, Record], dict[Cell, str]]:
    """Train the cells that a file does not hold yet, as ``gradbal.lab.training.resume.run`` does.

    Returns:
        What came out, earlier runs included, and for every cell that failed the reason.
    """
    records, failures = resume.run(cells, path, train, Record, jobs=jobs, quiet=quiet)
    complaints = {cell: record.complaint for cell, record in records.items() if record.complaint}
    return records, failures | complaints


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; return 1 if a cell failed."""
    options = parse(arguments)
    cells = cells_of(options.problems, options.archs, options.rules, options.seeds, options.epochs)
    records, failures = run(cells, options.out, jobs=options.jobs)
    command = " ".join(["python -m benchmarks.combinations", *(arguments or sys.argv[1:])])
    table = f"{heading(command)}\n{render(cells, records)}"
    options.out.with_suffix(".md").write_text(table)
    print(table)
    for cell, reason in failures.items():
        print(f"FAILED {cell}: {reason}", file=sys.stderr)
    n_cells = f"{len(cells) - len(failures)} of {len(cells)} cells train"
    print(f"{n_cells}; table in {options.out.with_suffix('.md')}", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combinations", description=__doc__)
    choices = {"problems": tuple(PROBLEMS), "archs": tuple(ARCHITECTURES), "rules": RULES}
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--epochs", type=opts.positive, default=8, help="default: %(default)s")
    opts.add_options(parser, "combinations")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
