"""Whole steps, forward pass and optimizer included, against peers (extra `bench`)."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.contestants import EW, PEERS, TOLERANCE, VECTOR, check, contestants, makers
from benchmarks.models import make_model, size_of
from benchmarks.reports import DTYPES, draw, parse, parser_of, write
from gradbal.lab.bench.measure import Timing, in_turn
from gradbal.lab.bench.report import SUMMED

TASKS = (2, 3, 8, 16)
REPRESENTATION = "representation"
EXPLANATION = f"""\
Milliseconds of a step with the summed loss, then how many times as long the others take: medians
of rounds in which everyone takes one step, ± half the distance of the quartiles. Before the clock
ran, all exact ones were seen to step with the same gradients. `{EW}` weights losses equally; what
follows applies UPGrad, up to `representation` and `sketched` with the engine of that name, then
TorchJD in its two modes. `{VECTOR}` is LibMTL's way, one backward pass per loss into a row, with
the weights of this package."""


@dataclass(frozen=True)
class Cell:
    """A model with so many tasks: everyone's time, difference from the reference, or complaint."""

    model: str
    n_tasks: int
    times: dict[str, Timing]
    differences: dict[str, float]
    complaints: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.model} x {self.n_tasks}"

    def ratio(self, name: str, other: str = SUMMED) -> float:
        return self.times[name].median / self.times[other].median

    def entry(self, name: str) -> str:
        if name not in self.times:
            return "-"
        time = self.times[name]
        if name == SUMMED:
            return f"{1e3 * time.median:.1f} ms"
        return f"{self.ratio(name):.2f} ± {(time.high - time.low) / 2 / time.median:.0%}"


def measure(model_name: str, n_tasks: int, given: argparse.Namespace) -> Cell:
    """Check that everyone does the same, then time all in turn."""
    dtype = DTYPES[given.dtype]
    size = size_of(model_name, given.device)
    model = make_model(model_name, n_tasks, size, given.device, dtype)
    builds = contestants(given.engines)
    differences, complaints = check(builds, model, TOLERANCE[dtype])
    sound = {name: build for name, build in builds.items() if name not in complaints}
    times, failed = in_turn(makers(model, sound), given.seconds, given.device)
    return Cell(model_name, n_tasks, times, differences, complaints | failed)


def rows(cells: Sequence[Cell], names: Sequence[str]) -> list[tuple[str, ...]]:
    header = ("model", "tasks", *names)
    lines = [
        (cell.model, str(cell.n_tasks), *(cell.entry(name) for name in names)) for cell in cells
    ]
    return [header, *lines]


def figures(cells: Sequence[Cell]) -> Iterator[str]:
    """Say what this package promises of its cost, and whether this run shows it."""
    both = [cell for cell in cells if {"auto", *PEERS} <= {*cell.times}]
    if both:
        faster = [min(PEERS, key=cell.ratio) for cell in both]
        lead = [cell.ratio(peer, "auto") for cell, peer in zip(both, faster, strict=True)]
        slower = [f"{c.place} ({1 / r:.2f})" for c, r in zip(both, lead, strict=True) if r < 1]
        usual = median(cell.ratio(PEERS[0], "auto") for cell in both)
        wide = [r for cell, r in zip(both, lead, strict=True) if cell.model == "mlp"]
        yield _verdict("`auto` is never slower than TorchJD's faster mode", slower)
        yield f"TorchJD's default mode takes {usual:.2f} times as long (median; to reach: 1.3)."
        if wide:
            yield f"Its faster mode, on the wide MLP: {min(wide):.2f} at least (to reach: 1.5)."
    over = [(c, c.times[EW].median - 1.02 * c.times[SUMMED].median) for c in cells if EW in c.times]
    late = [f"{cell.place} ({1e6 * more:.0f} us)" for cell, more in over if more > 1e-4]
    if over:
        yield _verdict(f"`{EW}` takes no more than 1.02 times as long + 100 us", late)
    cheap = [cell for cell in cells if cell.n_tasks == 8 and REPRESENTATION in cell.times]
    late = [f"{c.place} ({r:.2f})" for c in cheap if (r := c.ratio(REPRESENTATION)) > 1.15]
    if cheap:
        yield _verdict(f"`{REPRESENTATION}` takes no more than 1.15 times as long, 8 tasks", late)


def _verdict(claim: str, exceptions: Sequence[str]) -> str:
    return f"{claim}: {'not so for ' + ', '.join(exceptions) if exceptions else 'so it is'}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write what the command line asks for."""
    parser = parser_of("bench_steps", __doc__ or "", TASKS)
    parser.add_argument("--seconds", type=float, default=20.0, help="for all rounds of a cell")
    given = parse(parser, argv)
    cells = []
    for name in given.models:
        for n_tasks in given.tasks:
            cells.append(measure(name, n_tasks, given))
            print(cells[-1].place, *(f"{n} {cells[-1].entry(n)}," for n in cells[-1].times))
    names = list(contestants(given.engines))
    notes = [*figures(cells)]
    notes += [f"{c.place}: `{n}`: {why}" for c in cells for n, why in c.complaints.items()]
    write(given, "Whole steps", EXPLANATION, rows(cells, names), notes, [asdict(c) for c in cells])
    panels = {
        model: {
            name: [
                (c.n_tasks, c.ratio(name)) for c in cells if c.model == model and name in c.times
            ]
            for name in names[1:]
        }
        for model in given.models
    }
    draw(given.out.with_suffix(".png"), panels, len(panels), f"times the {SUMMED}")


if __name__ == "__main__":
    main()
