"""The command ``gradbal compare``."""

import argparse
import ast
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradbal import checks
from gradbal.compare import run, toy_runs
from gradbal.compare.problems import PROBLEMS
from gradbal.compare.settings import OPTIMIZERS, OWNER, RULES_BY_DEFAULT, Settings
from gradbal.compare.tables import markdown
from gradbal.compare.toy import PROTOCOLS
from gradbal.demo.settings import new_folder

TOY = "toy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    some = Settings(problem=PROBLEMS[0])
    several = f"names with commas between ({','.join(some.rules)})"
    archs, lrs = ",".join(some.archs), ",".join(f"{lr:g}" for lr in some.lrs)
    parser.add_argument("problem", metavar="problem", help=f"{TOY}, {', '.join(PROBLEMS)}")
    parser.add_argument("--path", type=Path, help="where the problem's files are")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the problem's loader, such as targets=2; may be given several times",
    )
    parser.add_argument("--rules", help=several)
    parser.add_argument("--archs", default=archs, help="names with commas between (%(default)s)")
    parser.add_argument("--lrs", default=lrs, help="learning rates to try (%(default)s)")
    parser.add_argument("--optimizer", default=some.optimizer, help=f"{', '.join(OPTIMIZERS)}")
    numbers = {
        "front": "vectors of fixed weights to try",
        "epochs": "at most",
        "patience": "epochs without a better one",
        "batch": "examples; the problem's own",
        "seeds": "how many",
        "tuned-on": "seeds on which learning rates are tried",
        "jobs": "processes",
    }
    for name, words in numbers.items():
        default = getattr(some, name.replace("-", "_"))
        shown = words if default is None else f"{words} ({default})"
        parser.add_argument(f"--{name}", type=int, default=default, help=shown)
    parser.add_argument("--device", default=some.device, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=some.out, help="folder (%(default)s)")
    parser.add_argument("--protocol", default="nash", help=f"{TOY}: {', '.join(PROTOCOLS)}")
    parser.add_argument("--copies", type=int, default=3, help=f"{TOY}: runs from each start")
    parser.add_argument("--steps", type=int, help=f"{TOY}: other than the protocol has")


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
    if given.problem == TOY:
        return _toy(given)
    settings = Settings(
        problem=given.problem,
        path=given.path,
        options=tuple(_option(text) for text in given.option),
        archs=_names(given.archs),
        lrs=tuple(_number(text) for text in _names(given.lrs)),
        rules=_names(given.rules) if given.rules else RULES_BY_DEFAULT,
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
    rules = _names(given.rules) if given.rules else toy_runs.RULES_BY_DEFAULT
    new_folder(OWNER, given.out)
    options = {"copies": given.copies, "jobs": given.jobs, "steps": given.steps}
    records, failures = toy_runs.run(given.protocol, rules, given.out, **options)
    failed = [f"{rule} fails: {why}" for rule, why in failures.items()]
    if not records:
        return "\n".join(failed)
    picture = given.out / f"toy_{given.protocol}.png"
    toy_runs.draw(records).savefig(picture, dpi=120)
    page = "\n\n".join([markdown(toy_runs.lines(records)), *failed])
    picture.with_suffix(".md").write_text(page + "\n", "utf-8")
    return f"{page}\n\nFiles: {picture.with_suffix('.md')} {picture}"


def _names(text: str) -> tuple[str, ...]:
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
