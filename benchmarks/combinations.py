"""Train every rule with every architecture on two real problems, and make one table.

``python -m benchmarks.combinations --help``, from the root of the repository.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # found also when this is run as a script

from benchmarks.cells import ARCHS, Cell, Record, cells_of, train
from benchmarks.problems import PROBLEMS
from benchmarks.tables import heading, render

RULES = (
    *("ew", "uw", "gradnorm", "mgda", "dwa", "gls", "graddrop", "pcgrad", "gradvac", "imtl"),
    *("cagrad", "rlw", "upgrad", "nash_mtl", "famo"),
)

Failures = dict[Cell, str]


def read_records(path: Path) -> dict[Cell, Record]:
    """Return the finished cells in a file; a last line that was cut off is no cell.

    Raises:
        ValueError: If another line cannot be read.
    """
    records = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is no record; delete the line.") from error
        cell = Cell(**fields.pop("cell"))
        records[cell] = Record(cell, **{**fields, "unmoved": tuple(fields["unmoved"])})
    return records


def write_records(path: Path, records: Mapping[Cell, Record]) -> None:
    """Write a file anew, so that it ends with a whole line; a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(_line(record) for record in records.values()))
    fresh.replace(path)


def run(
    cells: Sequence[Cell], path: Path, *, jobs: int = 1, quiet: bool = False
) -> tuple[dict[Cell, Record], Failures]:
    """Train the cells that a file does not hold yet, and add each to it when finished.

    Args:
        cells: What to train.
        path: A file of JSON lines, one per finished cell.
        jobs: Number of processes; 1 for this one alone.
        quiet: Show no progress.

    Returns:
        What came out, earlier runs included, and for every cell that failed the reason.
    """
    records = read_records(path)
    write_records(path, records)
    missing = [cell for cell in cells if cell not in records]
    failures: Failures = {}
    done = len(cells) - len(missing)
    with (
        path.open("a") as file,
        tqdm(total=len(cells), initial=done, unit="cell", disable=quiet) as bar,
    ):
        for cell, result in _trained(missing, jobs):
            bar.set_postfix_str(f"{cell.problem} {cell.arch} {cell.rule}", refresh=False)
            bar.update()
            if isinstance(result, Record):
                records[cell] = result
                file.write(_line(result))
                file.flush()
            else:
                failures[cell] = result
    wanted = {cell: records[cell] for cell in cells if cell in records}
    failures |= {cell: record.complaint for cell, record in wanted.items() if record.complaint}
    return wanted, failures


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
        where = f"{cell.problem} {cell.arch} {cell.rule} seed {cell.seed}"
        print(f"FAILED {where}: {reason}", file=sys.stderr)
    n_cells = f"{len(cells) - len(failures)} of {len(cells)} cells train"
    print(f"{n_cells}; table in {options.out.with_suffix('.md')}", file=sys.stderr)
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combinations", description=__doc__)
    choices = {"problems": tuple(PROBLEMS), "archs": tuple(ARCHS), "rules": RULES}
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    parser.add_argument("--epochs", type=_positive, default=8, help="default: %(default)s")
    parser.add_argument("--jobs", type=_positive, default=1, help="processes, one thread each")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/combinations.jsonl"),
        help="finished cells, kept for the next run (default: %(default)s); the table goes beside",
    )
    options = parser.parse_args(arguments)
    if options.out.suffix != ".jsonl":
        parser.error(f"--out must end in .jsonl, got {options.out}; the table goes beside it")
    return options


def _trained(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, Record | str]]:
    """Yield the cells as they are finished."""
    if jobs == 1:
        yield from ((cell, _attempt(cell)) for cell in cells)
        return
    # a fork would inherit threads of torch in an unknown state
    with ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent) as pool:
        futures = {pool.submit(_attempt, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:  # else an interrupted run would go on to its end
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, however it went."""
    if (parent := parent_process()) is not None:
        Thread(target=_await, args=(parent,), daemon=True).start()


def _await(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _attempt(cell: Cell) -> Record | str:
    """Return the record of a cell, or why there is none: one cell must not end the others."""
    try:
        with _quietly():
            return train(cell)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out remarks on single cells."""
    log = logging.getLogger("gradbal")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _line(record: Record) -> str:
    return json.dumps(asdict(record)) + "\n"


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
