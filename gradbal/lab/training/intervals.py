"""What several seeds say, and what is inside their noise."""

from collections.abc import Mapping, Sequence
from math import nan
from statistics import fmean, stdev
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
        quantile = stats.t.ppf(1 - LEVEL / 2, len(values) - 1)
        return cls(fmean(values), float(quantile * stdev(values) / len(values) ** 0.5))

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
        p: Chance of one so large if there were none, by Student's paired test; NaN for one seed.
    """

    less: Interval
    p: float

    @classmethod
    def of(cls, ours: Mapping[int, float], theirs: Mapping[int, float]) -> "Paired":
        """Compare numbers seed by seed; both need the same seeds."""
        from scipy import stats

        differences = [value - theirs[seed] for seed, value in ours.items()]
        less = Interval.of(differences)
        if not less.half > 0:  # one seed, or the same difference everywhere
            return cls(less, float(less.mean == 0) if less.half == 0 else nan)
        size = abs(less.mean) / (stdev(differences) / len(differences) ** 0.5)
        return cls(less, float(2 * stats.t.sf(size, len(differences) - 1)))


def holm(chances: Mapping[str, float]) -> dict[str, float]:
    """Correct chances for how many they are: among many tests some would be small by luck.

    Args:
        chances: Of each test.

    Returns:
        Those that may be compared with one level for all.

    Source:
        Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    corrected: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(chances, key=chances.__getitem__)):
        least = max(least, min(1.0, (len(chances) - rank) * chances[name]))
        corrected[name] = least
    return corrected
