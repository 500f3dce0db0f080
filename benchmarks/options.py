"""What all commands take that train cells."""

import argparse
from pathlib import Path


def add_options(
    parser: argparse.ArgumentParser, name: str, folder: str = "benchmarks/results"
) -> None:
    """Add what all commands take that train cells."""
    parser.add_argument("--jobs", type=positive, default=1, help="processes, one thread each")
    parser.add_argument(
        "--out",
        type=_lines,
        default=Path(f"{folder}/{name}.jsonl"),
        help="finished cells, kept for the next run (default: %(default)s); the table goes beside",
    )


def positive(text: str) -> int:
    """Read a number of at least one."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def _lines(text: str) -> Path:
    if not text.endswith(".jsonl"):
        raise argparse.ArgumentTypeError(f"must end in .jsonl, got {text}; the table goes beside")
    return Path(text)
