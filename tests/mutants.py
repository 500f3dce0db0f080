"""Mutation testing: how many of a seeded sample of small changes to the library do tests notice?

    python tests/mutants.py cover               # which test runs which line, into build/
    python tests/mutants.py sample              # draws changes, into tests/mutants.json
    python tests/mutants.py run --label before  # tries them one by one; started again, it goes on
    python tests/mutants.py report

After a change of the tests, or a move of files, `cover` and `run --label after` judge the same
changes anew. No file of the package is touched: a change lives in the memory of one process.
"""

import argparse
import gc
import importlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from dataclasses import replace
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import coverage
import hypothesis
import pytest
from mutations import AREAS, ROOT, Place, changed, draw, find, where, write

OPTIONS = [
    "-q",
    "-o",
    "addopts=--doctest-modules",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:cov",
    "-p",
    "no:xdist",
]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is imported before
# tests that run no part of these areas alone
IGNORED = (
    *("arch_zoo", "compare", "distributed", "integrations", "lab"),
    *("test_automtl", "test_bench", "test_cheap_modes", "test_combinations", "test_demo"),
)
PRELOADED = ("torch", "torch._dynamo", "torch.profiler", "scipy.optimize", "scipy.stats", "cvxpy")
BOARD = struct.Struct("id")  # the number of the test that runs, and when it started
NONE = int(pytest.ExitCode.NO_TESTS_COLLECTED)
LATE = 77  # the exit status of a trial that has no time for the next test
GRACE = 10  # seconds that the last test may take beyond the limit
VERDICTS = ("killed", "survived", "time limit", "not covered", "gone", "error")
SIZES = (100, 1000)  # tests in the files that a trial collects first and second


class Recorder:
    """A pytest plugin that measures every test: the lines it runs, its time, whether it passed."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        package = [str(ROOT / "gradbal" / "*")]
        self.lines = coverage.Coverage(data_file=None, config_file=False, include=package)
        self.seconds: dict[str, float] = defaultdict(float)
        self.passed: set[str] = set()
        self.failed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        sizes = Counter(item.path for item in items)
        items.sort(key=lambda item: sizes[item.path])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.lines.switch_context(item.nodeid)
        if time.monotonic() > self.end:
            item.session.shouldstop = "out of time"
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        elif report.when == "call" and report.passed:
            self.passed.add(report.nodeid)


def cover(args: argparse.Namespace) -> None:
    """Run the tests once, the largest files last; write which of those that pass run which lines.

    What a fixture of a module runs counts for the first of its tests.
    """
    recorder = Recorder(args.minutes)
    recorder.lines.start()
    ignored = [f"--ignore-glob=tests/{name}*" for name in IGNORED]
    pytest.main([*OPTIONS, "--tb=line", "-m", args.select, *ignored], plugins=[recorder])
    recorder.lines.stop()
    data = recorder.lines.get_data()
    tests = sorted(recorder.passed - recorder.failed)
    number = {test: index for index, test in enumerate(tests)}
    lines = {
        str(Path(file).relative_to(ROOT)): {
            line: sorted(number[test] for test in found if test in number)
            for line, found in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    seconds = [round(recorder.seconds[test], 4) for test in tests]
    args.data.parent.mkdir(exist_ok=True)
    args.data.write_text(json.dumps({"tests": tests, "seconds": seconds, "lines": lines}))
    print(f"{len(tests)} tests pass; these do not, and are left out: {sorted(recorder.failed)}")


def sample(args: argparse.Namespace) -> None:
    """Draw the changes of the table."""
    write(args.table, draw(args.n, args.seed))


def covering(place: Place, lines: dict[str, dict[str, list[int]]]) -> set[int]:
    """Return the tests that run a change; if it runs when imported, all that run its file."""
    found = lines.get(place.file, {})
    for first, last in ((place.start[0], place.end[0]), place.statement):
        rows = [found[str(line)] for line in range(first, last + 1) if str(line) in found]
        if any(rows) and not place.imported:
            return set().union(*rows)
        if rows:
            return set().union(*found.values())
    return set()


def plan(numbers: set[int], tests: list[str], seconds: list[float]) -> list[dict[str, int]]:
    """Order tests: cheap ones and the first of each function early, large files in later sessions.

    Twice the time puts a test as far back as twice as many of its function before it.
    """
    sizes = Counter(test.partition("::")[0] for test in tests)
    before: Counter[str] = Counter()
    sessions: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number in sorted(numbers, key=lambda number: (seconds[number], number)):
        function = tests[number].partition("[")[0]
        before[function] += 1
        cost = int(100 * seconds[number]).bit_length() + before[function].bit_length()
        session = sum(sizes[function.partition("::")[0]] > size for size in SIZES)
        sessions[session].append((cost, number))
    return [{tests[n]: n for _, n in sorted(part)} for _, part in sorted(sessions.items())]


class Loader(SourceFileLoader):
    """Imports one module from changed code."""

    def __init__(self, file: str, code: CodeType) -> None:
        name = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        super().__init__(name, str(ROOT / file))
        self.code = code

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or (spec := PathFinder.find_spec(name, path, target)) is None:
            return None
        spec.loader = self
        return spec

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class Session:
    """A pytest plugin that runs some tests in some order, and shows which one it has come to."""

    def __init__(self, order: dict[str, int], board: mmap.mmap, seconds: float) -> None:
        self.place = {test: place for place, test in enumerate(order)}
        self.order, self.board, self.seconds = order, board, seconds

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.place[item.nodeid])

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if time.process_time() > self.seconds:
            os._exit(LATE)
        BOARD.pack_into(self.board, 0, self.order[item.nodeid], time.process_time())


def attempt(
    file: str, code: CodeType, sessions: list[dict[str, int]], board: mmap.mmap, args: Any
) -> int:
    """Run tests, in a process of their own, with a file changed; return pytest's exit status."""
    limit = args.seconds + GRACE
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + GRACE))
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, sys.stdout.fileno())
    os.dup2(sink, sys.stderr.fileno())
    loader = Loader(file, code)
    sys.meta_path.insert(0, loader)
    try:  # before pytest does, which would take files with doctests from the disk
        importlib.import_module(loader.name)
    except Exception:
        return int(pytest.ExitCode.INTERRUPTED)
    status = NONE
    for order in sessions:
        files = dict.fromkeys(test.partition("::")[0] for test in order)
        options = [*OPTIONS, "-x", "--tb=no", "-m", args.select, *files]
        found = int(pytest.main(options, plugins=[Session(order, board, args.seconds)]))
        if found not in (0, NONE):
            return found
        status = min(status, found)
    return status


def judge(file: str, code: CodeType, sessions: list[dict[str, int]], data: Any, args: Any) -> Any:
    """Return the verdict on a change, and the test that was run last."""
    board = mmap.mmap(-1, BOARD.size)
    BOARD.pack_into(board, 0, -1, 0.0)
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            os._exit(attempt(file, code, sessions, board, args))
        finally:
            os._exit(int(pytest.ExitCode.INTERNAL_ERROR))
    end = time.monotonic() + 6 * (args.seconds + GRACE)  # for a test that waits for something
    while not (ended := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    number, start = BOARD.unpack(board)
    test, usual = (data["tests"][number], data["seconds"][number]) if number >= 0 else ("", 1.0)
    status, used = os.waitstatus_to_exitcode(ended[1]), ended[2].ru_utime + ended[2].ru_stime
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        hangs = time.monotonic() > end or used - start > GRACE / 2 + 10 * usual
        return ["killed" if hangs else "time limit", test]
    verdicts = {0: "survived", 1: "killed", 2: "killed", NONE: "not covered", LATE: "time limit"}
    return [verdicts.get(status, "killed" if status < 0 else "error"), test]


def run(args: argparse.Namespace) -> None:
    """Judge the changes of the table that have no verdict yet, and keep each verdict at once."""
    rows, data = json.loads(args.table.read_text()), json.loads(args.data.read_text())
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    todo = list(zip(rows, find(rows), strict=True))
    again = {"none", *args.again}
    todo = [item for item in todo if item[0]["verdicts"].get(args.label, ["none"])[0] in again]
    random.Random(0).shuffle(todo)  # what is judged of an interrupted run is a sample, too
    for count, (row, found) in enumerate(todo, 1):
        verdict = ["gone" if found is None else "not covered", ""]
        if found is not None:
            mutant, place = found
            row.update(where(place))
            if args.unchanged:
                mutant = replace(mutant, after=mutant.before)
            if numbers := covering(place, data["lines"]):
                sessions = plan(numbers, data["tests"], data["seconds"])
                verdict = judge(place.file, changed(mutant, place), sessions, data, args)
        row["verdicts"][args.label] = verdict
        write(args.table, rows)
        print(f"{count} of {len(todo)}: {row['file']}:{row['line']}", *verdict, flush=True)


def report(args: argparse.Namespace) -> None:
    """Print the verdicts by area, and the changes that some round of tests did not notice."""
    rows = json.loads(args.table.read_text())
    found: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for row in rows:
        for label, (verdict, _) in row["verdicts"].items():
            found[label].update([(row["area"], verdict), ("all", verdict)])
    print(f"| tests | area | {' | '.join(VERDICTS)} |\n{'|---' * (2 + len(VERDICTS))}|")
    for label, counts in found.items():
        for area in (*AREAS, "all"):
            numbers = " | ".join(str(counts[area, verdict]) for verdict in VERDICTS)
            print(f"| {label} | {area} | {numbers} |")
    for row in rows:
        seen = {label: verdict for label, (verdict, _) in row["verdicts"].items()}
        if set(seen.values()) - {"killed"}:
            print(f"\n{row['file']}:{row['line']} {row['function']}, {row['kind']}: {seen}")
            print(f"    {row['statement']}\n    {row['before']}  ->  {row['after']}")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    commands = {command.__name__: command for command in (cover, sample, run, report)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "cover.json")
    parser.add_argument("--table", type=Path, default=ROOT / "tests" / "mutants.json")
    parser.add_argument("--select", default="", help="marks of the tests, as for pytest -m")
    parser.add_argument("--minutes", type=float, default=60, help="most time for `cover`")
    parser.add_argument("--n", type=int, default=300, help="changes that are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", default="before", help="name of a round of verdicts")
    parser.add_argument("--seconds", type=int, default=20, help="processor time for one change")
    parser.add_argument("--again", nargs="*", default=[], help="verdicts to find anew")
    parser.add_argument("--unchanged", action="store_true", help="change nothing: all survive?")
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    settings = hypothesis.settings(derandomize=True, database=None, deadline=None)
    hypothesis.settings.register_profile("mutants", settings)
    hypothesis.settings.load_profile("mutants")
    commands[args.command](args)


if __name__ == "__main__":
    main()
