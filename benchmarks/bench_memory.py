"""Bytes held at the peak of a step, beyond those of the summed loss (extra `bench`)."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from benchmarks.contestants import EW, TOLERANCE, VECTOR, check, contestants, makers
from benchmarks.models import Size, make_model, size_of
from benchmarks.reports import DTYPES, draw, parse, parser_of, write
from gradbal.lab.bench.measure import peaks
from gradbal.lab.bench.report import SUMMED

TASKS = (2, 8, 16)
EXPLANATION = f"""\
The most bytes held at once in a step after the first ones, everything counted that was taken since
the model was copied: parameters, state of the optimizer, activations, gradients, and what is kept
from step to step. The column of the summed loss has megabytes; the others have what comes on top,
in units of one gradient of the trunk, n numbers, and in megabytes. So what grows as m x n shows
about the number of tasks in each line, or a multiple of it, and what does not shows less and less
from one size to the next. Each model comes as it is, twice as wide, and twice as deep. The names
are those of the benchmark of steps; `{EW}` weights losses equally, `{VECTOR}` is LibMTL's way."""


@dataclass(frozen=True)
class Cell:
    """A model of one size with so many tasks: everyone's peak in bytes, or complaint."""

    model: str
    size: str
    n_tasks: int
    unit: int  # bytes of one gradient of the trunk
    bytes: dict[str, int]
    complaints: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.model} ({self.size}) x {self.n_tasks}"

    def extra(self, name: str) -> int:
        return self.bytes[name] - self.bytes[SUMMED]

    def entry(self, name: str) -> str:
        if name not in self.bytes:
            return "-"
        if name == SUMMED:
            return f"{self.bytes[name] / 1e6:.1f}"
        return f"{self.extra(name) / self.unit:.1f} n ({self.extra(name) / 1e6:.1f})"


def sizes_of(size: Size) -> dict[str, Size]:
    return {
        "as it is": size,
        "twice as wide": size._replace(width=2 * size.width),
        "twice as deep": size._replace(depth=2 * size.depth),
    }


def measure(model_name: str, size_name: str, n_tasks: int, given: argparse.Namespace) -> Cell:
    """Check that everyone does the same, then count one by one."""
    dtype = DTYPES[given.dtype]
    size = sizes_of(size_of(model_name, given.device))[size_name]
    model = make_model(model_name, n_tasks, size, given.device, dtype)
    builds = contestants(given.engines)
    _, complaints = check(builds, model, TOLERANCE[dtype])
    sound = {name: build for name, build in builds.items() if name not in complaints}
    counted = peaks([*makers(model, sound).values()], given.device)
    unit = sum(param.nbytes for param in model.trunk.parameters())
    found = dict(zip(sound, counted, strict=True))
    return Cell(model_name, size_name, n_tasks, unit, found, complaints)


def cells_of(given: argparse.Namespace) -> Iterator[Cell]:
    for model_name in given.models:
        for size_name in given.sizes:
            for n_tasks in given.tasks:
                cell = measure(model_name, size_name, n_tasks, given)
                print(cell.place, *(f"{name} {cell.entry(name)}," for name in cell.bytes))
                yield cell


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print and write what the command line asks for."""
    parser = parser_of("bench_memory", __doc__ or "", TASKS)
    sizes = list(sizes_of(Size(1, 1, 1, 1)))
    parser.add_argument("--sizes", nargs="+", default=sizes, choices=sizes)
    given = parse(parser, argv)
    cells = list(cells_of(given))
    names = list(contestants(given.engines))
    header = ("model", "size", "tasks", "n", *names)
    rows = [
        (c.model, c.size, str(c.n_tasks), f"{c.unit / 1e6:.1f}", *map(c.entry, names))
        for c in cells
    ]
    notes = [f"{c.place}: `{n}`: {why}" for c in cells for n, why in c.complaints.items()]
    write(
        given, "Memory of a step", EXPLANATION, [header, *rows], notes, [asdict(c) for c in cells]
    )
    panels = {
        f"{model}, {size}": {
            name: [
                (c.n_tasks, max(c.extra(name) / 1e6, 0.1))  # of a logarithm
                for c in cells
                if (c.model, c.size) == (model, size) and name in c.bytes
            ]
            for name in names[1:]
        }
        for model in given.models
        for size in given.sizes
    }
    draw(given.out.with_suffix(".png"), panels, len(given.sizes), f"megabytes beyond the {SUMMED}")


if __name__ == "__main__":
    main()
