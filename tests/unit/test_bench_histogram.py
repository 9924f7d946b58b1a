"""Percentiles against a naive computation, and histograms that come back as they were."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.bench.histogram import HIGHEST, Histogram


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=500))
def test_percentiles_are_those_of_the_sorted_samples(samples: list[int]) -> None:
    histogram = Histogram()
    histogram.record(samples)
    ordered, at = sorted(samples), histogram.percentiles()
    for value, percent in ((at.p50, 500), (at.p90, 900), (at.p99, 990), (at.p999, 999)):
        naive = ordered[math.ceil(Fraction(percent) / 1000 * len(ordered)) - 1]
        assert value == pytest.approx(naive, rel=0.001, abs=1)
    assert at.max == ordered[-1]


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=200))
def test_what_was_kept_comes_back(samples: list[int]) -> None:
    histogram = Histogram()
    histogram.record(samples)
    again = Histogram.decode(histogram.encoded())
    assert again.count == len(samples)
    before, after = histogram.percentiles(), again.percentiles()
    assert after.p50 == pytest.approx(before.p50, rel=0.001)
    assert after.max == pytest.approx(before.max, rel=0.001)


def test_samples_add_up() -> None:
    histogram = Histogram()
    histogram.record([100] * 99)
    histogram.record([5000])
    assert histogram.count == 100
    assert histogram.percentiles().p50 == 100
    assert histogram.percentiles().max == 5000


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Histogram().percentiles()
    with pytest.raises(ValueError, match="beyond"):
        Histogram().record([HIGHEST * 4])
    with pytest.raises(ValueError, match="not a histogram"):
        Histogram.decode(b"not one")
