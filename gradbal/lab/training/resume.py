"""Cells trained in several processes, each kept as a line of a file as soon as it is finished."""

import json
import logging
import os
import signal
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from gradbal._utils.log import log

C = TypeVar("C", bound=Hashable)  # what is trained; `str` names it
R = TypeVar("R", bound="Kept")


class Kept:
    """Base of records: dataclasses of numbers, words, tuples and dicts, with the field ``cell``.

    Attributes:
        cell: What was trained; its dataclass is the key under which :func:`run` finds the record.
    """

    cell: Any  # a dataclass of its own for each kind of record

    @classmethod
    def read(cls: type[R], fields: dict[str, Any]) -> R:
        """Return a record from what JSON made of its fields."""
        record: R = _typed(cls, fields)
        return record


def _typed(kind: Any, value: Any) -> Any:
    """Return a value of JSON as annotated: dataclasses from dicts, tuples from lists."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: _typed(hints[name], field) for name, field in value.items()})  # type: ignore[operator]  # a class
    if get_origin(kind) is tuple:
        return tuple(_typed(get_args(kind)[0], entry) for entry in value)
    return value


def read_records(path: Path, kind: type[R]) -> dict[Any, R]:
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
        record = kind.read(fields)
        records[record.cell] = record
    return records


def write_records(path: Path, records: Mapping[C, R]) -> None:
    """Write a file anew, so that it ends with a whole line; a kill leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text("".join(_line(record) for record in records.values()))
    fresh.replace(path)


def run(
    cells: Sequence[C],
    path: Path,
    train: Callable[[C], R],
    kind: type[R],
    *,
    jobs: int = 1,
    quiet: bool = False,
) -> tuple[dict[C, R], dict[C, str]]:
    """Train the cells that a file does not hold yet, and add each to it when finished.

    Args:
        cells: What to train.
        path: A file of JSON lines, one per finished cell.
        train: Trains one cell; can be pickled if there are several processes.
        kind: The class of the records.
        jobs: Number of processes; 1 for this one alone.
        quiet: Show no progress.

    Returns:
        What came out, earlier runs included, and for every cell that raised the reason.

    Raises:
        KeyboardInterrupt: If interrupted; its text says what is kept.
    """
    records = read_records(path, kind)
    write_records(path, records)
    missing = [cell for cell in cells if cell not in records]
    failures: dict[C, str] = {}
    done = len(cells) - len(missing)
    try:
        with (
            path.open("a") as file,
            _progress(len(cells), done, quiet) as bar,
            closing(_trained(missing, train, jobs)) as results,
        ):
            for cell, result in results:
                if bar is not None:
                    bar.set_postfix_str(str(cell), refresh=False)
                    bar.update()
                if isinstance(result, str):
                    failures[cell] = result
                else:
                    records[cell] = result
                    file.write(_line(result))
                    file.flush()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{path} keeps {len(records)} finished runs, and the same command goes on from there"
        ) from None
    return {cell: records[cell] for cell in cells if cell in records}, failures


def _progress(total: int, done: int, quiet: bool) -> Any:  # tqdm's bar
    """Return a bar, or nothing where it is not wanted or not installed."""
    if quiet or find_spec("tqdm") is None:
        return nullcontext()
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="cell")


def _trained(
    cells: Sequence[C], train: Callable[[C], R], jobs: int
) -> Generator[tuple[C, R | str], None, None]:
    """Yield the cells as they are finished."""
    attempt = partial(_attempt, train)
    if jobs == 1:
        yield from ((cell, attempt(cell)) for cell in cells)
        return
    # a fork would inherit threads of torch in an unknown state
    others = {*active_children()}
    with ProcessPoolExecutor(jobs, get_context("spawn"), _end_with_parent) as pool:
        futures = {pool.submit(attempt, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:  # interrupted: the workers would first finish what they have begun
            for worker in {*active_children()} - others:
                worker.terminate()
            raise


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, and silently by Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if (parent := parent_process()) is not None:
        Thread(target=_await, args=(parent,), daemon=True).start()


def _await(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _attempt(train: Callable[[C], R], cell: C) -> R | str:
    """Return the record of a cell, or why there is none: one cell must not end the others."""
    try:
        with _quietly():
            return train(cell)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out remarks on single cells."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _line(record: object) -> str:
    return json.dumps(asdict(record)) + "\n"  # type: ignore[call-overload]  # a dataclass
