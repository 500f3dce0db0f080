"""The command ``gradbal``."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradbal import __version__, checks
from gradbal.aggregation import aggregate
from gradbal.bench.report import Report
from gradbal.bench.rules import further, rule_times
from gradbal.bench.steps import Target
from gradbal.compare import command
from gradbal.demo.settings import ARCHS, SEARCH, SEARCH_RULES, Settings, check_rules
from gradbal.engines import PRESETS
from gradbal.registry import RULES, Entry, make_rule
from gradbal.rule import Claim, GradientRule, GramRule, LossRule, Rule

Rows = Sequence[tuple[str, ...]]
JACOBIAN = [[4.0, 0.0, 1.0, 0.0], [-1.0, 2.0, 0.0, 0.5], [-1.0, -3.0, 0.5, 1.0]]  # all conflict
BENCH_SECONDS = 2.0  # for each rule with each engine
SEEDS = 4  # tried to find out whether a rule draws random numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The words after ``gradbal``; None for those of the process.

    Returns:
        The exit code 0.

    Raises:
        SystemExit: With the code 2 where an argument is wrong, after a sentence that says why; with
            130 after Ctrl-C, after a line that says what was reached.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # names with accents, on terminals without
    parser, parsers = _parsers()
    given, unknown = parser.parse_known_args(argv)
    chosen = parsers.get(given.command, parser)
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if given.command == "list":
            rows = claim_rows() if given.claims else rule_rows()
            print(markdown_table(rows) if given.markdown else plain_table(rows))
        elif given.command == "demo":
            _demo(chosen, given)
        elif given.command == "bench":
            _bench(chosen, given)
        elif given.command == "compare":
            _compare(chosen, given, sys.argv[1:] if argv is None else argv)
        else:
            parser.print_help()
    except KeyboardInterrupt as stop:
        reached = f"; {stop}" if str(stop) else ""
        chosen.exit(130, f"{chosen.prog}: interrupted{reached}.\n")
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:  # argparse's own
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`.\n")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser of the command line, and those of the commands by name."""
    parser = _Parser(prog="gradbal", description="Gradient balancing for several losses.")
    parser.add_argument("--version", action="version", version=f"gradbal {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    rules = commands.add_parser("list", help="show the rules", description=rule_rows.__doc__)
    rules.add_argument("--markdown", action="store_true", help="print a Markdown table")
    rules.add_argument("--claims", action="store_true", help="show what each rule promises")
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
    return parser, {"list": rules, "demo": demo, "bench": bench, "compare": compared}


def _bench_parser(commands: "argparse._SubParsersAction[_Parser]") -> _Parser:
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


def _demo(parser: _Parser, given: argparse.Namespace) -> None:
    usual = SEARCH_RULES if given.arch == SEARCH else Settings.rules
    try:
        settings = Settings(
            rules=usual if given.rules is None else tuple(_names(given.rules)),
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
    from gradbal import demo

    report = demo.run(settings)
    print(plain_table(report.rows()), report.words(), sep="\n\n", flush=True)
    print("\nPictures:", *demo.draw(report, settings.out))


def _demo_search(settings: Settings) -> None:
    from gradbal.demo import automtl

    found = automtl.run(settings)
    for trial in found.trials:
        print(f"The policy under {trial.rule}\n", plain_table(trial.rows()), "", sep="\n")
    print(plain_table(found.rows()), found.words(), sep="\n\n", flush=True)
    print("\nPictures:", *automtl.draw(found, settings.out))


def _bench(parser: _Parser, given: argparse.Namespace) -> None:
    try:
        if given.target:
            rules, engines = _names(f"ew,{given.rules or 'upgrad'}"), _names(given.engines)
            check_rules(parser.prog, rules)
            for engine in engines:
                checks.one_of(parser.prog, tuple(PRESETS), engines=engine)
            report = Report(Target.find(given.target), rules, engines, BENCH_SECONDS)
            print(plain_table(report.rows()), report.words(), sep="\n\n")
        else:
            rules = sorted(RULES) if given.rules is None else _names(given.rules)
            check_rules(parser.prog, rules)
            print(plain_table(rule_times(rules, given.tasks)))
    except (TypeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {str(error).removeprefix(f'{parser.prog}: ')}\n")


def _compare(parser: _Parser, given: argparse.Namespace, words: Sequence[str]) -> None:
    try:
        print(command.compare(given, words))
    except ValueError as error:
        parser.exit(2, f"{error}\n")


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


# ---------------------------------------------------------------------- the table of rules


def rule_rows() -> Rows:
    """Show every rule: its source, what it looks at, and what it keeps from step to step."""
    header = ("rule", "paper", "looks at", "from step to step", "random", "scale", "heads")
    return [header, *(_row(RULES[name]) for name in sorted(RULES))]


def claim_rows() -> Rows:
    """Show what every rule promises with its default options."""
    names = [claim.name.lower().replace("_", " ") for claim in Claim]
    rows = [
        (name, *("yes" if claim in RULES[name].claims else "-" for claim in Claim))
        for name in sorted(RULES)
    ]
    return [("rule", *names), *rows]


def _row(entry: Entry) -> tuple[str, ...]:
    rule, year = make_rule(entry.name), str(entry.year or "")
    paper = entry.paper if year in entry.paper else f"{entry.paper}, {year}"
    answers = [_answer(rule, seed) for seed in range(SEEDS)]
    random = any(not torch.equal(answers[0], answer) for answer in answers)
    return (
        entry.name,
        paper,
        _looks_at(rule),
        _keeps(rule),
        "yes" if random else "-",
        rule.scale,
        rule.heads,
    )


def _looks_at(rule: Rule) -> str:
    if isinstance(rule, LossRule):
        return "losses" if rule.needs_losses else "nothing"
    signal = "gradients" if isinstance(rule, GradientRule) else "Gram matrix"
    if isinstance(rule, GramRule) and rule.norms_only:
        signal = "gradient norms"
    return f"{signal}, losses" if rule.needs_losses else signal


def _keeps(rule: Rule) -> str:
    kept = "keeps state" if rule.init(torch.zeros(2)) else "-"
    if rule.learned:
        kept = "learns"
    observes = type(rule).observe is not Rule.observe
    return f"{kept}, sees the losses after the step" if observes else kept


def _answer(rule: Rule, seed: int) -> Tensor:
    """Return what a rule makes of three tasks in conflict."""
    jacobian, losses = torch.tensor(JACOBIAN, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])
    more = further(rule, jacobian, losses)
    generator = torch.Generator().manual_seed(seed)
    return aggregate(jacobian, rule, losses=losses, more=more, generator=generator).direction


def plain_table(rows: Rows) -> str:
    """Return rows in columns, a line under the header; columns of numbers end at the right.

    Example:
        >>> print(plain_table([("rule", "steps"), ("uw", "7"), ("famo", "-")]))
        rule  steps
        ----  -----
        uw        7
        famo      -
    """
    columns = [_aligned(column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _aligned(column: Sequence[str]) -> list[str]:
    width = max(map(len, column))
    cells = [column[0], "-" * width, *column[1:]]
    numbers = all(cell == "-" or cell.lstrip("+-")[:1].isdigit() for cell in column[1:])
    return [cell.rjust(width) if numbers else cell.ljust(width) for cell in cells]


def markdown_table(rows: Rows) -> str:
    """Return rows as a Markdown table, with the first cells as code.

    Example:
        >>> print(markdown_table([("rule", "year"), ("uw", "2018")]))
        | rule | year |
        |---|---|
        | `uw` | 2018 |
    """
    body = [(f"`{first}`", *rest) for first, *rest in rows[1:]]
    head = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in body)])
