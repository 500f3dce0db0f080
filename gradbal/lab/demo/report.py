"""What the demo found, and how it is summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import NamedTuple

from torch import Tensor

from gradbal.lab.demo.model import HIGHER_IS_BETTER, TASKS, Scores
from gradbal.lab.training import summary

LOOK_EVERY = 5  # steps
HEADER = (
    "rule",
    "left %",
    "right %",
    "distance px",
    "Delta_m %",
    "time / ew",
    "conflicts %",
)
SCORES = """\
left, right: share of the digits that are read correctly; distance: mean absolute error. All are
  measured once, on the test pictures, with the weights of the best epoch on validation.
Delta_m: mean relative change against networks that learn one task each; lower is better."""
NOTES = f"""\
{SCORES}
time: median of all steps; the rules are trained in turn, in one process, on the same batches.
conflicts: share of the steps inspected (one in {LOOK_EVERY}) in which some pair of task gradients
  has a negative cosine; for rules that use no gradients it is measured separately and not timed."""
NEXT = """\
What to try next:
  gradbal demo --seed 1         shows how much of the differences is chance
  gradbal demo --arch MMoE      gives every task its own mixture of three experts
  gradbal compare two_digits    tunes every rule alike, on several seeds, against fixed weights
  gradbal list                  shows all rules"""


class Look(NamedTuple):
    """What was seen in one step.

    Attributes:
        step: Number of the step.
        weights: The task weights, or None for rules that have none.
        cosines: Between the task gradients, by pair of tasks.
        conflict: Whether one of these cosines is negative.
    """

    step: int
    weights: Scores | None
    cosines: dict[str, float]
    conflict: bool

    @classmethod
    def at(cls, step: int, metrics: Mapping[str, Tensor]) -> "Look":
        """Read what ``MTLOptimizer.metrics`` says after a step."""
        cosines = {
            f"{a} / {b}": metrics[f"gradbal/cos/{a}/{b}"].item()
            for i, a in enumerate(TASKS)
            for b in TASKS[i + 1 :]
        }
        weights = {
            task: metrics[key].item()
            for task in TASKS
            if (key := f"gradbal/weight/{task}") in metrics
        }
        conflict = metrics["gradbal/conflict_share"].item() > 0
        return cls(step, weights or None, cosines, conflict)


@dataclass
class Outcome:
    """How one rule did.

    Attributes:
        name: Name of the rule, or of the baseline.
        validation: Scores after each epoch.
        test: Scores of the chosen epoch.
        times: Seconds of each step.
        looks: What was seen on the way.
    """

    name: str
    validation: list[Scores]
    test: Scores = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """The whole contest.

    Attributes:
        baseline: The single-task networks, taken together.
        outcomes: One per rule; the first is the reference of the step times.
    """

    baseline: Outcome
    outcomes: list[Outcome]

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table of results, header first."""
        reference = median(self.outcomes[0].times)
        alone = self.baseline
        rows: list[tuple[str, ...]] = [HEADER, (alone.name, *shown(alone.test), "0.0", "-", "-")]
        for outcome in self.outcomes:
            rows.append(
                (
                    outcome.name,
                    *shown(outcome.test),
                    f"{delta_m(outcome.test, alone.test):+.1f}",
                    f"{median(outcome.times) / reference:.2f}",
                    f"{100 * mean(look.conflict for look in outcome.looks):.0f}",
                )
            )
        return rows

    def words(self) -> str:
        """Say what the columns are, what the numbers of this run mean, and what to try next."""
        alone, outcomes = self.baseline.test, self.outcomes
        changes = {outcome.name: delta_m(outcome.test, alone) for outcome in outcomes}
        by_task = {
            task: mean(delta_m({task: o.test[task]}, {task: alone[task]}) for o in outcomes)
            for task in TASKS
        }
        most = max(by_task, key=lambda task: abs(by_task[task]))
        times = {outcome.name: median(outcome.times) for outcome in outcomes}
        ratios = {name: time / times[outcomes[0].name] for name, time in times.items()}
        return "\n\n".join(
            [
                NOTES,
                "What the numbers of this run mean:\n"
                f"- Delta_m is {_range(changes, '+.1f')}. Above 0, sharing a network made the "
                "tasks worse than a\n  network for each; below 0, better.\n"
                f"- By task, the mean change for the worse is {_listed(by_task)}:\n"
                f"  most of Delta_m comes from {most}.\n"
                f"- A step takes {_range(ratios, '.2f')} times as long as with the plain sum, "
                "ew.\n  Rules that use gradients need a backward pass for each task.\n"
                "- Expect small differences between rules: a rule only changes how the three task "
                "gradients are\n  added up. The network, the batches and the learning rate, which "
                "is tuned for none of them, are\n  the same. With one seed, a few points of "
                "Delta_m may be chance: this is an example, not a\n  ranking.",
                NEXT,
            ]
        )


def _range(values: Mapping[str, float], form: str) -> str:
    """Name the lowest and the highest value."""
    low, high = (choose(values, key=values.__getitem__) for choose in (min, max))
    if low == high:
        return f"{values[low]:{form}} ({low})"
    return f"{values[low]:{form}} ({low}) to {values[high]:{form}} ({high})"


def _listed(changes: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {change:+.1f} %" for task, change in changes.items())


def shown(scores: Scores) -> tuple[str, str, str]:
    """Write the scores of all tasks for a table."""
    left, right = (f"{100 * scores[task]:.1f}" for task in ("left", "right"))
    return left, right, f"{scores['distance']:.3f}"


def delta_m(scores: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """Compare scores by task with those of networks that learn one task each, in percent."""
    ours, theirs = ({t: {"score": value} for t, value in s.items()} for s in (scores, baseline))
    higher = {task: {"score": up} for task, up in HIGHER_IS_BETTER.items()}
    return summary.delta_m(ours, theirs, higher)


def best_epoch(values: Sequence[float], task: str | None = None) -> int:
    """Return the first epoch with the best value.

    Args:
        values: One per epoch.
        task: The task whose score it is; None for Delta_m, where lower is better.
    """
    best = max if task is not None and HIGHER_IS_BETTER[task] else min
    return values.index(best(values))
