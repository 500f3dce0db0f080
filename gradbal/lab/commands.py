"""The commands that run experiments: ``gradbal demo``, ``bench`` and ``compare``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gradbal._utils import checks
from gradbal._utils.tables import plain_table
from gradbal.cli import Parser
from gradbal.jacobian.engines import PRESETS
from gradbal.lab.bench.report import Report
from gradbal.lab.bench.rules import rule_times
from gradbal.lab.bench.steps import Target
from gradbal.lab.checks import check_rules
from gradbal.lab.compare import command
from gradbal.lab.demo.settings import ARCHS, SEARCH, SEARCH_RULES, Settings
from gradbal.rules._registry import RULES

BENCH_SECONDS = 2.0  # for each rule with each engine


def add_commands(commands: "argparse._SubParsersAction[Parser]") -> dict[str, Parser]:
    """Add the commands of the lab to a command line, and return their parsers by name."""
    what = "train a small network on two-digit pictures under several rules"
    demo = commands.add_parser("demo", help=what, description=f"{what.capitalize()}.")
    default = Settings()
    usual = f"{','.join(default.rules)}; with {SEARCH} {','.join(SEARCH_RULES)}"
    demo.add_argument("--rules", help=f"names of rules, separated by commas ({usual})")
    archs = f"how the tasks share parameters: {', '.join(ARCHS)} (%(default)s)"
    demo.add_argument("--arch", default=default.arch, help=archs)
    passes = "passes over the training pictures (%(default)s)"
    demo.add_argument("--epochs", type=int, default=default.epochs, help=passes)
    draws = "seed of pictures, initial weights, batches and rules (%(default)s)"
    demo.add_argument("--seed", type=int, default=default.seed, help=draws)
    device = "device to train on, as torch names it (%(default)s)"
    demo.add_argument("--device", default=default.device, help=device)
    demo.add_argument(
        "--out", type=Path, default=default.out, help="folder for the pictures (%(default)s)"
    )
    bench, what = _bench_parser(commands), "compare rules honestly with tuned fixed weights"
    compared = commands.add_parser("compare", help=what, description=f"{what.capitalize()}.")
    command.add_arguments(compared)
    found = {"demo": demo, "bench": bench, "compare": compared}
    for name, run in (("demo", _demo), ("bench", _bench), ("compare", _compare)):
        found[name].set_defaults(run=run)
    return found


def _bench_parser(commands: "argparse._SubParsersAction[Parser]") -> Parser:
    bench = commands.add_parser(
        "bench",
        help="time the rules, or rules and engines on a model of yours",
        description="Time the rules on random task gradients, or, given a function that returns a "
        "model and a function of its losses, a whole step with each rule and engine.",
    )
    bench.add_argument(
        "target",
        nargs="?",
        metavar="module:function",
        help="returns (model, losses_fn), or adds an optimizer",
    )
    bench.add_argument(
        "--rules", help="names of rules, separated by commas (all; with a function: upgrad)"
    )
    engines = "names of engines, separated by commas; used with a function (%(default)s)"
    bench.add_argument("--engines", default=",".join(PRESETS), help=engines)
    bench.add_argument(
        "--tasks",
        type=int,
        nargs="+",
        default=(2, 3, 8, 16),
        help="numbers of tasks, separated by spaces; used without a function (2 3 8 16)",
    )
    return bench


def _demo(parser: Parser, given: argparse.Namespace, words: Sequence[str]) -> None:
    usual = SEARCH_RULES if given.arch == SEARCH else Settings.rules
    try:
        settings = Settings(
            rules=usual if given.rules is None else command.names(given.rules),
            arch=given.arch,
            epochs=given.epochs,
            seed=given.seed,
            device=given.device,
            out=given.out,
        )
        settings.prepare()
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    if settings.arch == SEARCH:
        _demo_search(settings)
        return
    from gradbal.lab import demo

    report = demo.run(settings)
    print(plain_table(report.rows()), report.words(), sep="\n\n", flush=True)
    print("\nPictures:", *demo.draw(report, settings.out))


def _demo_search(settings: Settings) -> None:
    from gradbal.lab.demo import automtl

    found = automtl.run(settings)
    for trial in found.trials:
        print(f"The policy under {trial.rule}\n", plain_table(trial.rows()), "", sep="\n")
    print(plain_table(found.rows()), found.words(), sep="\n\n", flush=True)
    print("\nPictures:", *automtl.draw(found, settings.out))


def _bench(parser: Parser, given: argparse.Namespace, words: Sequence[str]) -> None:
    try:
        if given.target:
            rules, engines = (
                command.names(f"ew,{given.rules or 'upgrad'}"),
                command.names(given.engines),
            )
            check_rules(parser.prog, rules)
            for engine in engines:
                checks.one_of(parser.prog, tuple(PRESETS), engines=engine)
            report = Report(Target.find(given.target), rules, engines, BENCH_SECONDS)
            print(plain_table(report.rows()), report.words(), sep="\n\n")
        else:
            rules = tuple(sorted(RULES)) if given.rules is None else command.names(given.rules)
            check_rules(parser.prog, rules)
            print(plain_table(rule_times(rules, given.tasks)))
    except (TypeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {str(error).removeprefix(f'{parser.prog}: ')}\n")


def _compare(parser: Parser, given: argparse.Namespace, words: Sequence[str]) -> None:
    try:
        print(command.compare(given, words))
    except ValueError as error:
        parser.exit(2, f"{error}\n")
