"""What rules and engines cost a user's own model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from gradbal.graph.losses import named_losses
from gradbal.lab.bench.measure import Maker, Timing, in_turn, peaks
from gradbal.lab.bench.steps import Target
from gradbal.rules._base import LossRule
from gradbal.rules._registry import make_rule

SUMMED = "summed loss"
INEXACT = ("representation", "sketched")  # engines that show a rule something else


@dataclass
class Cost:
    """What a rule with an engine costs.

    Attributes:
        rule: Name of the rule.
        engine: Name of the engine.
        time: Seconds of a step.
        ratio: Over a step with the summed loss, timed in turn with it.
        peak: Most bytes held at once; None where the device keeps no count.
    """

    rule: str
    engine: str
    time: Timing
    ratio: float
    peak: int | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """The line of a table."""
        time = self.time
        ms, low, high = (f"{1e3 * part:.2f}" for part in (time.median, time.low, time.high))
        return (self.rule, self.engine, ms, f"{low}-{high}", f"{self.ratio:.2f}", self.memory)

    @property
    def memory(self) -> str:
        """The peak in megabytes."""
        return "-" if self.peak is None else f"{self.peak / 1e6:.1f}"


class Report:
    """Times a step for every rule and engine, and says what came out.

    Args:
        target: The user's function.
        rules: Names of the rules; those on losses are timed with one engine.
        engines: Names of the engines.
        seconds: How long to time each pair of them.

    Raises:
        ValueError: If a rule is unknown, or the function returns something else.
        TypeError: If the losses are none.
    """

    def __init__(
        self, target: Target, rules: Sequence[str], engines: Sequence[str], seconds: float
    ) -> None:
        pairs = [
            (name, engine)
            for name in rules
            for engine in (("auto",) if isinstance(make_rule(name), LossRule) else engines)
        ]
        model, losses, _ = target.subject()
        named_losses(losses())
        device = next(model.parameters()).device
        self.costs: list[Cost] = []
        self.complaints: list[str] = []
        summed = []
        for rule, engine in pairs:  # only two models exist at a time
            makers: dict[str, Maker] = {
                SUMMED: target.summed,
                "": partial(target.balanced, rule, engine),
            }
            times, complaints = in_turn(makers, seconds, device)
            if SUMMED in complaints:
                raise ValueError(f"a step with the summed loss fails: {complaints[SUMMED]}")
            summed.append(times[SUMMED])
            if complaints:
                self.complaints.append(f"`{rule}` with `{engine}` fails: {complaints['']}")
            else:
                ratio = times[""].median / times[SUMMED].median
                self.costs.append(Cost(rule, engine, times[""], ratio))
        self.summed = Cost(f"({SUMMED})", "-", _middle(summed), 1.0)
        makers_of_all: list[Maker] = [target.summed]
        makers_of_all += [partial(target.balanced, c.rule, c.engine) for c in self.costs]
        counted = peaks(makers_of_all, device)
        for cost, peak in zip([self.summed, *self.costs], counted, strict=False):
            cost.peak = peak

    def rows(self) -> list[tuple[str, ...]]:
        """Show time and memory, one line for each rule and engine."""
        header = ("rule", "engine", "ms", "quartiles", f"x {SUMMED}", "peak MB")
        return [header, *(cost.row for cost in (self.summed, *self.costs))]

    def words(self) -> str:
        """Say which engine and rule cost what."""
        lines = [
            f"A step with the {SUMMED} takes {1e3 * self.summed.time.median:.2f} ms; the others "
            "were timed in turn with it, one by one."
        ]
        for rule in dict.fromkeys(cost.rule for cost in self.costs):
            exact = [c for c in self.costs if c.rule == rule and c.engine not in INEXACT]
            loose = [c for c in self.costs if c.rule == rule and c.engine in INEXACT]
            if isinstance(make_rule(rule), LossRule):
                lines.append(f"`{rule}` takes {exact[0].ratio:.2f} times as long.")
            elif exact:
                lines.append(_fastest(rule, exact))
            lines += [
                f"With `{cost.engine}` it takes {cost.ratio:.2f} times as long, and sees something "
                "else than the task gradients."
                for cost in loose
            ]
        return "\n".join([*lines, *self.complaints])


def _middle(times: Sequence[Timing]) -> Timing:
    return sorted(times, key=lambda time: time.median)[len(times) // 2]


def _fastest(rule: str, exact: Sequence[Cost]) -> str:
    """Compare the engines that differ in nothing but cost."""
    *_, slowest = by_time = sorted(exact, key=lambda cost: cost.ratio)
    least = min(exact, key=lambda cost: cost.peak or 0)
    said = (
        f"`{rule}` is fastest with `{by_time[0].engine}` ({by_time[0].ratio:.2f} times as long), "
        f"slowest with `{slowest.engine}` ({slowest.ratio:.2f})"
    )
    if least.peak is not None:
        said += f", and holds least with `{least.engine}` ({least.memory} MB)"
    return f"{said}."
