"""Student's intervals and paired tests over seeds, and p-values adjusted by Holm's method."""

from collections.abc import Mapping, Sequence
from math import nan
from statistics import fmean
from typing import NamedTuple

LEVEL = 0.05  # of the tests; intervals hold the other 95 %


class Interval(NamedTuple):
    """A mean over seeds, and half the length of its 95 % interval; NaN for a single seed."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return Student's interval."""
        from scipy import stats

        if len(values) < 2:
            return cls(fmean(values), nan)
        return cls(
            fmean(values),
            float(stats.t.ppf(1 - LEVEL / 2, len(values) - 1) * stats.sem(values)),
        )

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return self.shown(".1f")

    def shown(self, form: str) -> str:
        """Write the mean, and the half length where there is one."""
        more = f" ± {self.half:{form.lstrip('+')}}" if self.half == self.half else ""
        return f"{self.mean:{form}}{more}"


class Paired(NamedTuple):
    """How one method differs from another on the same seeds.

    Attributes:
        less: The difference.
        p: Two-sided p-value of the paired t-test; NaN for one seed.
    """

    less: Interval
    p: float

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> "Paired":
        """Compare numbers seed by seed; both need the same seeds."""
        from scipy import stats

        pairs = [(value, theirs[seed]) for seed, value in ours.items()]
        less = Interval.of([a - b for a, b in pairs])
        if less.half > 0:
            return cls(less, float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue))
        # one seed, or the same difference everywhere
        return cls(less, float(less.mean == 0) if less.half == 0 else nan)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number by Holm's method, which SciPy does not have.

    Args:
        p_values: Of each test.

    Returns:
        P-values that may be compared with one level for all.

    Source:
        Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = least
    return corrected
