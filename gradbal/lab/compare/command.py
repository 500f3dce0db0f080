"""The command ``gradbal compare``."""

import argparse
import ast
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradbal._utils import checks
from gradbal._utils.tables import markdown_table
from gradbal.lab.checks import check_packages, new_folder
from gradbal.lab.compare import run
from gradbal.lab.compare.settings import OWNER, RULES_BY_DEFAULT, Settings
from gradbal.lab.problems import PROBLEMS, check_problem
from gradbal.lab.toy import runs as toy_runs
from gradbal.lab.toy.problem import PROTOCOLS
from gradbal.lab.training.loop import OPTIMIZERS

TOY = "toy"
NAMES = (TOY, *PROBLEMS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    some = Settings(problem=PROBLEMS[0])
    several = f"names of rules, separated by commas ({','.join(some.rules)})"
    separated = "names of architectures, separated by commas (%(default)s)"
    archs, lrs = ",".join(some.archs), ",".join(f"{lr:g}" for lr in some.lrs)
    parser.add_argument("problem", metavar="problem", help=f"one of {', '.join(NAMES)}")
    parser.add_argument("--path", type=Path, help="where the problem's files are")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the problem's loader, such as targets=2; may be given several times",
    )
    parser.add_argument("--rules", help=several)
    parser.add_argument("--archs", default=archs, help=separated)
    rates = "learning rates to try, separated by commas (%(default)s)"
    parser.add_argument("--lrs", default=lrs, help=rates)
    bases = f"base optimizer: {', '.join(OPTIMIZERS)} (%(default)s)"
    parser.add_argument("--optimizer", default=some.optimizer, help=bases)
    numbers = {
        "front": "number of vectors of fixed weights to try",
        "epochs": "largest number of passes over the training examples",
        "patience": "epochs without improvement on validation after which a run ends",
        "batch": "examples in a batch (the problem's own)",
        "seeds": "number of seeds",
        "tuned-on": "number of seeds on which all learning rates are tried",
        "jobs": "number of processes",
    }
    for name, words in numbers.items():
        default = getattr(some, name.replace("-", "_"))
        shown = words if default is None else f"{words} ({default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=shown)
    device = "device to train on, as torch names it (%(default)s)"
    parser.add_argument("--device", default=some.device, help=device)
    folder = "folder for finished runs, tables and pictures (%(default)s)"
    parser.add_argument("--out", type=Path, default=some.out, help=folder)
    program = f"{TOY}: program of a paper, one of {', '.join(PROTOCOLS)} (%(default)s)"
    parser.add_argument("--protocol", default="nash", help=program)
    copies = f"{TOY}: number of runs from each start (%(default)s)"
    parser.add_argument("--copies", type=int, default=3, help=copies)
    parser.add_argument("--steps", type=int, help=f"{TOY}: number of steps (the program's own)")


def compare(given: argparse.Namespace, words: Sequence[str]) -> str:
    """Run a comparison.

    Args:
        given: The arguments.
        words: The command line, for the record.

    Returns:
        What is to be printed.

    Raises:
        ValueError: If an argument cannot be.
    """
    check_problem(given.problem, NAMES)
    if given.problem == TOY:
        return _toy(given)
    settings = Settings(
        problem=given.problem,
        path=given.path,
        options=tuple(_option(text) for text in given.option),
        archs=names(given.archs),
        lrs=tuple(_number(text) for text in names(given.lrs)),
        rules=names(given.rules) if given.rules else RULES_BY_DEFAULT,
        front=given.front,
        optimizer=given.optimizer,
        epochs=given.epochs,
        patience=given.patience,
        batch=given.batch,
        seeds=given.seeds,
        tuned_on=given.tuned_on,
        jobs=given.jobs,
        device=given.device,
        out=given.out,
    )
    shown = [Path(word).name if word == str(given.path) else word for word in words]
    report = run(settings)
    files = report.save(shlex.join(["gradbal", *shown]))
    return f"{report.words()}\nFiles: {' '.join(map(str, files))}"


def _toy(given: argparse.Namespace) -> str:
    checks.one_of(OWNER, tuple(PROTOCOLS), protocol=given.protocol)
    checks.at_least(OWNER, 1, copies=given.copies, jobs=given.jobs, steps=given.steps or 1)
    rules = names(given.rules) if given.rules else toy_runs.RULES_BY_DEFAULT
    check_packages(OWNER, "compare", ("matplotlib",))
    new_folder(OWNER, given.out)
    options = {"copies": given.copies, "jobs": given.jobs, "steps": given.steps}
    records, failures = toy_runs.run(given.protocol, rules, given.out, **options)
    failed = [f"{rule} fails: {why}" for rule, why in failures.items()]
    if not records:
        return "\n".join(failed)
    picture = given.out / f"toy_{given.protocol}.png"
    toy_runs.draw(records).savefig(picture, dpi=120)
    page = "\n\n".join([markdown_table(toy_runs.lines(records)), *failed])
    picture.with_suffix(".md").write_text(page + "\n", "utf-8")
    return f"{page}\n\nFiles: {picture.with_suffix('.md')} {picture}"


def names(text: str) -> tuple[str, ...]:
    """Return the words between commas, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{OWNER}: `lrs` must be numbers, got {text!r}.") from None


def _option(text: str) -> tuple[str, Any]:
    """Read ``name=value``; a value that is no Python literal is a word."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"{OWNER}: `option` must be NAME=VALUE, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
