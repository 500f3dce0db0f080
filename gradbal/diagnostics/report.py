"""What recorded steps say, in words."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradbal.diagnostics.course import Course
from gradbal.jacobian.engines import Representation, Sketched
from gradbal.optimizer import MTLOptimizer
from gradbal.rules._base import LossRule, Rule

ENOUGH = 20  # steps, for a verdict
ROUNDING = 1e-6  # cosines this close to zero are neither conflict nor harmony
RARE = 0.01  # a share of steps that does not count
DOMINANT = 2.0  # times as long as the next task gradient
COLLAPSED = 0.01  # of the mean weight
LISTED = 5  # tasks or pairs


def report(mtl_opt: MTLOptimizer, course: Course, newest: Course, count: int, skipped: int) -> str:
    """Say what recorded steps were like.

    Args:
        mtl_opt: The optimizer that took them.
        course: An even sample of all steps.
        newest: The newest steps.
        count: How many were taken.
        skipped: How many were left out because something was not finite.
    """
    left_out = f", {skipped} left out because something was not finite" if skipped else ""
    lines = [f"{type(mtl_opt.rule).__name__}: {count} steps taken{left_out}."]
    if not len(course.steps):
        return f"{lines[0]} Nothing is recorded."
    if len(course.steps) < count:
        lines[0] += f" What follows is from {len(course.steps)} of them, evenly spread."
    seconds = course.seconds.nanmedian().item()
    if seconds == seconds:  # not of the first step alone
        lines.append(f"Time from step to step: {1e3 * seconds:.3g} ms (median).")
    pairs = _pairs(course)
    if not pairs.isfinite().any():
        lines.append(_unseen(mtl_opt.rule))
    else:
        lines += [
            *_place(mtl_opt),
            *_conflicts(course, pairs),
            *_lengths(course),
            *_direction(course),
        ]
    lines += [*_weights(newest), *_solver(course)]
    if pairs.isfinite().any():
        lines.append(_verdict(course, pairs))
    return "\n".join(lines)


def _unseen(rule: Rule) -> str:
    why = (
        f"{type(rule).__name__} looks at the losses alone"
        if isinstance(rule, LossRule)
        else "no gradients of two tasks were compared"
    )
    return (
        f"Conflict: unknown, since {why}; `layer_conflicts(losses, model)` shows it for one batch."
    )


def _place(mtl_opt: MTLOptimizer) -> Iterator[str]:
    """Say what inner products are taken of, if not of all shared parameters' gradients."""
    what = "What follows is what the rule sees: inner products"
    if mtl_opt.gram_over is not None:
        yield f"{what} over the parameters in `gram_over`."
    if isinstance(mtl_opt.engine, Representation):
        yield f"{what} at the representation."
    if isinstance(mtl_opt.engine, Sketched):
        yield f"{what} as sketches estimate them."


def _conflicts(course: Course, pairs: Tensor) -> Iterator[str]:
    """Say which tasks conflict, how often and how much."""
    first, second = _positions(course)
    names = [f"{course.tasks[i]} / {course.tasks[j]}" for i, j in zip(first, second, strict=True)]
    opposed = pairs < -ROUNDING
    n = _any(pairs.isfinite())
    if not opposed.any():
        lowest = int(pairs.nan_to_num(torch.inf).amin(dim=0).argmin())
        cosine = pairs[:, lowest].nan_to_num(torch.inf).min()
        yield (
            f"Conflict: no two task gradients had a negative cosine in {n} steps; the lowest was "
            f"{cosine:.2g} ({names[lowest]})."
        )
        return
    together = pairs.isfinite().sum(dim=0)
    share = opposed.sum() / together.sum()
    yield (
        f"Conflict: some cosine of two task gradients was negative in {_of(_any(opposed), n)}, "
        f"{share:.0%} of all cosines."
    )
    often = opposed.sum(dim=0)
    order = (often / together.clamp(min=1)).argsort(descending=True, stable=True).tolist()
    shown = [k for k in order if often[k]]
    for k in shown[:LISTED]:
        known = pairs[:, k][pairs[:, k].isfinite()]
        yield (
            f"  {names[k]}: negative in {_of(often[k], together[k])}, median {known.median():.2g}, "
            f"lowest {known.min():.2g}"
        )
    if len(shown) > LISTED:
        yield f"  others, less often: {len(shown) - LISTED}"


def _lengths(course: Course) -> Iterator[str]:
    """Say which task gradient is the longest."""
    order, medians = _dominance(course)
    top, *others = order
    longest = course.norms.nan_to_num(-1.0).argmax(dim=1)[_seen(course)]
    if _dominates(medians, order):
        ratio = medians[top] / medians[others[0]]
        yield (
            f"Lengths: {course.tasks[top]} dominates; its gradient is {ratio:.3g} times as long as "
            f"that of the next, {course.tasks[others[0]]} (medians), and was the longest in "
            f"{_of((longest == top).sum(), len(longest))}."
        )
    else:
        yield (
            f"Lengths: no task dominates; medians from {medians[top]:.3g} ({course.tasks[top]}) to "
            f"{medians[order[-1]]:.3g} ({course.tasks[order[-1]]})."
        )


def _direction(course: Course) -> Iterator[str]:
    """Say how the rule's direction differs from the plain sum, and what both do to the losses."""
    n = int(_seen(course).sum())
    hurt = course.along_sum < -ROUNDING
    harm = f"To first order the plain sum raises the loss of some task in {_of(_any(hurt), n)}"
    if hurt.any():
        worst = int(hurt.sum(dim=0).argmax())
        harm += f", most often {course.tasks[worst]} ({hurt[:, worst].sum()})"
    cosine = course.cosine_to_sum
    if not cosine.isfinite().any():
        yield "Direction: no weighted sum of these gradients, so they do not tell how it compares."
        yield f"{harm}."
        return
    known = cosine[cosine.isfinite()]
    yield (
        f"Direction: its cosine with the plain sum is {known.median():.3f} (median; lowest "
        f"{known.min():.3f}), its length {course.length_to_sum.nanmedian():.3g} times that of the "
        "sum (median), which acts like a factor on the learning rate."
    )
    own = _any(course.along_direction < -ROUNDING)
    yield f"{harm}; the direction does so in {_of(own, len(known))}."


def _weights(newest: Course) -> Iterator[str]:
    """Say whether some tasks have hardly any weight left."""
    sizes = newest.weights.abs()
    known = sizes.isfinite()
    several = known.sum(dim=1) > 1
    if not several.any():
        return
    few = sizes <= COLLAPSED * sizes.nanmean(dim=1, keepdim=True)
    share = (few & several[:, None]).sum(dim=0) / known[several].sum(dim=0).clamp(min=1)
    gone = [newest.tasks[i] for i in share.argsort(descending=True) if share[i] > 0.5]
    n = int(several.sum())
    if gone:
        yield (
            f"Weights: collapsed for {_listed(gone)}: at most {COLLAPSED:.0%} of the mean weight "
            f"in more than half of the newest {n} steps."
        )
    else:
        yield f"Weights: none has collapsed in the newest {n} steps."


def _solver(course: Course) -> Iterator[str]:
    known = course.residuals[course.residuals.isfinite()]
    if len(known):
        yield f"Solver: residual {known.max():.1e} at most."


def _verdict(course: Course, pairs: Tensor) -> str:
    """Say whether there is something for a rule to resolve."""
    n = _any(pairs.isfinite())
    if n < ENOUGH:
        return f"Verdict: too few steps for one, {n} where {ENOUGH} are the least."
    opposed = _any(pairs < -ROUNDING)
    harmful = _any(course.along_sum < -ROUNDING)
    if opposed <= RARE * n:
        order, medians = _dominance(course)
        balance = (
            " What sets the tasks apart is length, and fixed weights on the losses balance that."
            if _dominates(medians, order)
            else ""
        )
        return (
            "Verdict: no conflict here: the plain sum is as good. It raises no loss, to first "
            f"order, in {_of(n - harmful, n)}.{balance}"
        )
    if harmful <= RARE * n:
        return (
            "Verdict: some gradients conflict, but not with the plain sum: it raises no loss, "
            f"to first order, in {_of(n - harmful, n)}. Compare with it before you pay for a rule."
        )
    return (
        f"Verdict: conflict: the plain sum raises some loss in {_of(harmful, n)}. Whether the rule "
        "helps, only a comparison with tuned fixed weights can say."
    )


def _positions(course: Course) -> tuple[list[int], list[int]]:
    """Return the two tasks of each pair."""
    m = len(course.tasks)
    first, second = torch.triu_indices(m, m, offset=1).tolist()
    return first, second


def _pairs(course: Course) -> Tensor:
    """Return the cosine of each pair, shape ``[s, p]``."""
    first, second = _positions(course)
    return course.cosines[:, first, second]


def _seen(course: Course) -> Tensor:
    """Return in which steps there were gradients, shape ``[s]``."""
    return course.norms.isfinite().any(dim=1)


def _dominance(course: Course) -> tuple[list[int], Tensor]:
    """Return the tasks from the longest gradient to the shortest, and the median lengths."""
    medians = course.norms.nanmedian(dim=0).values
    order = medians.nan_to_num(-1.0).argsort(descending=True, stable=True).tolist()
    return [i for i in order if medians[i].isfinite()], medians


def _dominates(medians: Tensor, order: Sequence[int]) -> bool:
    return len(order) > 1 and bool(medians[order[0]] > DOMINANT * medians[order[1]])


def _any(found: Tensor) -> int:
    """Count the steps in which something was found."""
    return int(found.any(dim=1).sum())


def _of(count: int | Tensor, total: int | Tensor) -> str:
    return f"{int(count)} of {int(total)} steps ({int(count) / max(int(total), 1):.0%})"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} others" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
