"""The one list of rules: filled at import, then only read."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

from gradbal._utils.checks import did_you_mean
from gradbal.rules._base import Claim, GradientRule, GramRule, LossRule, Rule
from gradbal.rules._names import RuleName

R = TypeVar("R", bound=type[Rule])


@dataclass(frozen=True)
class Entry:
    """A registered rule.

    Attributes:
        name: The registered name, also that of its module.
        rule: The class.
        claims: What it promises with its default options.
        paper: Authors and venue, for the table of rules.
        year: Year of publication, or None for folklore.
        aliases: Other names.
    """

    name: str
    rule: type[Rule]
    claims: frozenset[Claim]
    paper: str
    year: int | None
    aliases: tuple[str, ...] = ()


_RULES: dict[str, Entry] = {}
RULES: Mapping[str, Entry] = MappingProxyType(_RULES)


def register(
    name: str,
    *,
    claims: Collection[Claim] = (),
    paper: str = "",
    year: int | None = None,
    aliases: tuple[str, ...] = (),
) -> Callable[[R], R]:
    """Enter a rule into the registry; to be used as a class decorator.

    Args:
        name: What users type; lower case with underscores.
        claims: Promises that the shared tests then hold the rule to. That a rule on losses is
            linear under scaling need not be said: its weights know no gradient.
        paper: Authors and venue.
        year: Year of publication.
        aliases: Other names that users may type.

    Raises:
        ValueError: If a name is taken by another class.
        TypeError: If the class is no ``LossRule``, ``GramRule`` or ``GradientRule``.
    """

    def enter(rule: R) -> R:
        if not (isinstance(rule, type) and issubclass(rule, LossRule | GramRule | GradientRule)):
            raise TypeError(
                f"register: {name!r} must decorate a LossRule, a GramRule or a GradientRule, "
                f"got {rule!r}."
            )
        known = _by_name()
        for wanted in (name, *aliases):
            if wanted in known:
                taken = known[wanted].rule.__name__
                raise ValueError(
                    f"register: the name {wanted!r} is taken by {taken}; choose another."
                )
        kept = {*claims, Claim.LINEAR} if issubclass(rule, LossRule) else claims
        _RULES[name] = Entry(name, rule, frozenset(kept), paper, year, aliases)
        return rule

    return enter


def _by_name() -> dict[str, Entry]:
    """Return all entries, also by their aliases."""
    return {name: entry for entry in RULES.values() for name in (entry.name, *entry.aliases)}


def rule_names() -> tuple[str, ...]:
    """Return the registered names, aliases among them, in alphabetical order.

    Example:
        >>> "upgrad" in rule_names()
        True
    """
    return tuple(sorted(_by_name()))


def make_rule(name: RuleName | str | Rule, **options: Any) -> Rule:
    """Build a rule from its registered name.

    Args:
        name: A registered name; a rule object is returned as it is.
        **options: The rule's own options, named as in its paper.

    Raises:
        ValueError: If the name or an option is unknown; the nearest known one is suggested.
        TypeError: If ``name`` is neither a string nor a rule.

    Example:
        >>> make_rule("cagrad", c=0.5)
        CAGrad(c=0.5, rescale='c2', solver='exact')
    """
    if isinstance(name, Rule):
        if options:
            raise TypeError(
                f"make_rule: options go with a registered name, got them with {name!r}; "
                "use dataclasses.replace to change a rule object."
            )
        return name
    if not isinstance(name, str):
        raise TypeError(
            f"A rule must be a registered name or a Rule object, got {name!r}; "
            "`gradbal.rule_names()` lists all names."
        )
    entry = RULES.get(name) or _by_name().get(name)
    if entry is None:
        raise ValueError(
            f"Unknown rule {name!r}.{did_you_mean(name, _by_name())} "
            "`gradbal.rule_names()` lists all of them."
        )
    rule = entry.rule
    known = list(inspect.signature(rule).parameters) if options else []
    for option in options:
        if option not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(
                f"{rule.__name__}: unknown option {option!r}.{did_you_mean(option, known)} "
                f"Its options: {listed}."
            )
    return rule(**options)
