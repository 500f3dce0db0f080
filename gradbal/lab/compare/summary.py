"""One number for many figures: the relative changes of the field, and the mean rank."""

from collections.abc import Mapping
from statistics import fmean
from typing import TypeVar

from gradbal.lab.demo import report

T = TypeVar("T")
Scores = Mapping[str, Mapping[str, float]]  # figures by task
Higher = Mapping[str, Mapping[str, bool]]  # for each figure whether a higher one is better


def delta_m(scores: Scores, baseline: Scores, higher: Higher) -> float:
    r"""Return the mean relative change over all figures of all tasks, in percent; lower is better.

    .. math:: \Delta_m = \frac{100}{S} \sum_s (-1)^{d_s} (M_s - B_s) / B_s

    with :math:`d_s = 1` where a higher figure is better. A task with many figures counts for more.

    Args:
        scores: The figures :math:`M`.
        baseline: The figures :math:`B` of models that learn one task each; it says which count.
        higher: As the tasks say it.

    Returns:
        The change; NaN where a baseline is zero.
    """
    return report.delta_m(_flat(scores), _flat(baseline), _flat(higher))


def delta_p(scores: Scores, baseline: Scores, higher: Higher) -> float:
    r"""Return the mean over tasks of the mean relative gain, in percent; higher is better.

    .. math:: \Delta_p = \frac{100}{T} \sum_t \frac{1}{S_t} \sum_s (-1)^{s_{ts}}
        (M_{ts} - B_{ts}) / B_{ts}

    with :math:`s_{ts} = 1` where a lower figure is better. All tasks count alike.

    Args:
        scores: As for :func:`delta_m`.
        baseline: As there.
        higher: As there.

    Returns:
        The gain; NaN where a baseline is zero.
    """
    return -fmean(report.delta_m(scores[t], baseline[t], higher[t]) for t in baseline)


def mean_rank(pool: Mapping[str, Scores], higher: Higher) -> dict[str, float]:
    """Return for each method the mean over all figures of its rank; 1 is the best.

    Equal figures share the mean of their ranks. Ranks depend on who is in the pool, so name it.

    Args:
        pool: The figures of each method.
        higher: As the tasks say it.
    """
    signs = {key: -1 if up else 1 for key, up in _flat(higher).items()}
    costs = {
        name: [sign * figures[key] for key, sign in signs.items()]
        for name, scores in pool.items()
        for figures in [_flat(scores)]
    }
    return {
        name: fmean(
            (1 + sum(o < cost for o in others) + sum(o <= cost for o in others)) / 2
            for cost, *others in zip(own, *costs.values(), strict=True)
        )
        for name, own in costs.items()
    }


def average(scores: Scores, chosen: Mapping[str, str]) -> float:
    """Return the mean over tasks of one figure each, such as aRRMSE or the mean AUC.

    Args:
        scores: The figures.
        chosen: The figure of each task.
    """
    return fmean(scores[task][figure] for task, figure in chosen.items())


def _flat(nested: Mapping[str, Mapping[str, T]]) -> dict[str, T]:
    return {f"{t}/{name}": value for t, some in nested.items() for name, value in some.items()}
