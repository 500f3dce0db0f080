"""Summaries of many figures in one number: Delta_m, Delta_p, the mean rank, the mean."""

from collections.abc import Mapping
from math import nan
from statistics import fmean, mean

from gradbal.lab.problems.problem import Task

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

    Example:
        >>> higher = {"digit": {"accuracy": True}, "distance": {"mae": False}}
        >>> alone = {"digit": {"accuracy": 0.8}, "distance": {"mae": 0.2}}
        >>> delta_m({"digit": {"accuracy": 0.88}, "distance": {"mae": 0.25}}, alone, higher)
        7.5
    """
    pairs = [(task, name) for task, figures in baseline.items() for name in figures]
    if not all(baseline[task][name] for task, name in pairs):
        return nan
    return 100 * mean(
        (-1 if higher[task][name] else 1)
        * (scores[task][name] - baseline[task][name])
        / baseline[task][name]
        for task, name in pairs
    )


def main_figures(scores: Scores, tasks: Mapping[str, Task]) -> dict[str, float]:
    """Return the figure of each task by which it chooses between epochs and settings."""
    return {name: scores[name][task.select] for name, task in tasks.items()}


def main_delta_m(
    scores: Mapping[str, float], baseline: Mapping[str, float], tasks: Mapping[str, Task]
) -> float:
    """Return :func:`delta_m` over :func:`main_figures`.

    Args:
        scores: The main figure of each task.
        baseline: The same of models that learn one task each.
        tasks: The tasks.
    """
    ours, theirs = (
        {name: {task.select: some[name]} for name, task in tasks.items()}
        for some in (scores, baseline)
    )
    return delta_m(ours, theirs, {name: task.higher for name, task in tasks.items()})


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
    return -fmean(delta_m(scores, {task: some}, higher) for task, some in baseline.items())


def mean_rank(pool: Mapping[str, Scores], higher: Higher) -> dict[str, float]:
    """Return for each method the mean over all figures of its rank; 1 is the best.

    Equal figures share the mean of their ranks. Ranks depend on who is in the pool, so name it.

    Args:
        pool: The figures of each method.
        higher: As the tasks say it.
    """
    from scipy import stats

    signs = {(task, name): -1 if up else 1 for task, s in higher.items() for name, up in s.items()}
    costs = [
        [sign * scores[task][name] for (task, name), sign in signs.items()]
        for scores in pool.values()
    ]
    return dict(zip(pool, stats.rankdata(costs, axis=0).mean(axis=1).tolist(), strict=True))


def average(scores: Scores, chosen: Mapping[str, str]) -> float:
    """Return the mean over tasks of one figure each, such as aRRMSE or the mean AUC.

    Args:
        scores: The figures.
        chosen: The figure of each task.
    """
    return fmean(scores[task][figure] for task, figure in chosen.items())
