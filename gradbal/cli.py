"""The command ``gradbal``."""

import argparse
import io
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import torch
from torch import Tensor

from gradbal import __version__
from gradbal._utils.tables import Rows, markdown_table, plain_table
from gradbal.aggregation import Elsewhere, aggregate
from gradbal.rules._base import Claim, GradientRule, GramRule, LossRule, Rule
from gradbal.rules._registry import RULES, Entry, make_rule

JACOBIAN = [[4.0, 0.0, 1.0, 0.0], [-1.0, 2.0, 0.0, 0.5], [-1.0, -3.0, 0.5, 1.0]]  # all conflict
SEEDS = 4  # tried to find out whether a rule draws random numbers
LIBRARY = ("list", "--version")  # words that need nothing of the lab


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
    words = list(sys.argv[1:] if argv is None else argv)
    parser, parsers = _parsers(with_lab=not words or words[0] not in LIBRARY)
    given, unknown = parser.parse_known_args(words)
    chosen = parsers.get(given.command, parser)
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if given.command is None:
            parser.print_help()
        else:
            given.run(chosen, given, words)
    except KeyboardInterrupt as stop:
        reached = f"; {stop}" if str(stop) else ""
        chosen.exit(130, f"{chosen.prog}: interrupted{reached}.\n")
    return 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def __init__(self, **options: Any) -> None:  # argparse's own
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`.\n")


def _parsers(*, with_lab: bool) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command line, and those of the commands by name.

    Args:
        with_lab: Whether to import the commands that run experiments.
    """
    parser = Parser(prog="gradbal", description="Gradient balancing for several losses.")
    parser.add_argument("--version", action="version", version=f"gradbal {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    rules = commands.add_parser("list", help="show the rules", description=rule_rows.__doc__)
    rules.add_argument("--markdown", action="store_true", help="print a Markdown table")
    rules.add_argument("--claims", action="store_true", help="show what each rule promises")
    rules.set_defaults(run=_list)
    found = {"list": rules}
    if with_lab:
        found |= import_module("gradbal.lab.commands").add_commands(commands)
    return parser, found


def _list(parser: Parser, given: argparse.Namespace, words: Sequence[str]) -> None:
    rows = claim_rows() if given.claims else rule_rows()
    print(markdown_table(rows, code=True) if given.markdown else plain_table(rows))


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


def further(rule: Rule, jacobian: Tensor, losses: Tensor) -> list[Tensor | Elsewhere]:
    """Return as many further batches as a rule needs, each like the first one.

    Args:
        rule: The rule.
        jacobian: Task gradients of the first batch, shape ``[m, n]``.
        losses: Its losses, shape ``[m]``.
    """

    def elsewhere(shift: Tensor) -> tuple[Tensor, Tensor]:
        return losses, jacobian

    probes = isinstance(rule, GradientRule) and rule.probes
    return [elsewhere if probes else jacobian] * (min(rule.batches) - 1)
