"""Intervals, paired tests and Holm's correction, against SciPy and worked out by hand."""

import math

import pytest
from scipy import stats

from gradbal.lab.training.intervals import Interval, Paired, holm

OURS, THEIRS = [1.0, 2.5, 3.0, 4.5], [1.5, 2.0, 4.0, 6.0]


def test_an_interval_is_students() -> None:
    found = Interval.of(OURS)
    low, high = stats.t.interval(0.95, 3, loc=2.75, scale=stats.sem(OURS))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert str(found) == "2.8 ± 2.3"
    assert found.shown("+.2f") == "+2.75 ± 2.30"


def test_one_seed_has_no_interval() -> None:
    found = Interval.of([3.0])
    assert str(found) == "3.0"
    assert not found.clear
    assert math.isnan(Paired.of({0: 1.0}, {0: 2.0}).p)


def test_a_paired_test_is_students() -> None:
    found = Paired.of(dict(enumerate(OURS)), dict(enumerate(THEIRS)))
    wanted = stats.ttest_rel(OURS, THEIRS)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.less.mean == pytest.approx(-0.625)
    assert Paired.of({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1
    assert Paired.of({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).p == 0  # the same difference each time


def test_holm_is_stricter_the_more_there_are() -> None:
    assert holm({"a": 0.04}) == {"a": 0.04}
    assert holm({"a": 0.02, "b": 0.04, "c": 0.9}) == pytest.approx({"a": 0.06, "b": 0.08, "c": 0.9})
    assert holm({"a": 0.6, "b": 0.5}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}
