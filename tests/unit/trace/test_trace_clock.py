"""The clock filter under simulated clocks: the true offset lies within the stated bound, whatever the delays."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.trace.clock import ClockMap, Limits, RoundTrip

SECOND = 1_000_000_000


def round_trip(at: int, delays: tuple[int, int, int], offset: float, rate: float) -> RoundTrip:
    """What two clocks show, the other being `offset` ahead and faster by `rate`."""
    there, stay, back = delays

    def other(time: int) -> int:
        return round(time + offset + rate * time)

    return RoundTrip(at, at + there + stay + back, other(at + there), other(at + there + stay))


DELAY = st.one_of(st.integers(0, 2000), st.integers(0, 20_000_000))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100 * SECOND), DELAY, DELAY, DELAY), min_size=1, max_size=40),
       st.integers(-(1 << 62), 1 << 62), st.floats(-450e-6, 450e-6), st.integers(0, 1000))
def test_the_true_offset_lies_within_the_bound(samples: list[tuple[int, int, int, int]], offset: int, rate: float,
                                               seed: int) -> None:
    base = 1000 * SECOND  # rates apply to elapsed time: keep floats exact enough
    trips = [round_trip(at, delays, 0, rate) for at, *delays in samples]  # type: ignore[arg-type]
    trips = [RoundTrip(t.sent + base, t.received + base, t.came + base + offset, t.left + base + offset) for t in trips]
    found, chance = ClockMap(Limits.of(trips)), random.Random(seed)
    assert found.steps == 0
    for _ in range(50):
        at = chance.randrange(-10 * SECOND, 110 * SECOND)
        guess, bound = found.at(at + base)
        # Exact: a float of 2**58 ns is off by up to 32.
        assert abs(guess - (offset + Fraction(rate) * at)) <= bound + 1


@given(st.integers(-(10**15), 10**15), st.floats(-400e-6, 400e-6))
@settings(deadline=None)
def test_the_inverse_is_as_good(offset: int, rate: float) -> None:
    chance = random.Random(7)
    trips = [round_trip(n * SECOND // 4, (chance.randrange(500, 9000), 100, chance.randrange(500, 90000)), 0, rate)
             for n in range(40)]
    trips = [t._replace(came=t.came + offset, left=t.left + offset) for t in trips]
    back = ClockMap(Limits.of(trips).inverse())
    for at in range(0, 10 * SECOND, SECOND // 3):
        other = round(at + offset + rate * at)
        guess, bound = back.at(other)
        assert abs(other + guess - at) <= bound + 1


def test_the_bound_is_half_the_best_round_trip_and_its_distance() -> None:
    trips = [round_trip(n * SECOND, (300 if n == 5 else 400_000, 50, 200 if n == 5 else 3_000_000), 123456, 20e-6)
             for n in range(11)]
    found = ClockMap(Limits.of(trips))
    assert found.at(5 * SECOND)[1] <= 250 + 5
    assert found.at(6 * SECOND)[1] <= 250 + 500e-6 * SECOND
    low, high = found.drift
    assert low <= 20e-6 <= high


def test_asymmetric_delays_shift_the_guess_and_never_beyond_the_bound() -> None:
    for there, back in ((1, 1_000_000), (1_000_000, 1), (500, 500)):
        trips = [round_trip(n * SECOND // 10, (there, 10, back), -5_000_000, 0) for n in range(30)]
        guess, bound = ClockMap(Limits.of(trips)).at(SECOND)
        assert abs(guess + 5_000_000) <= bound <= (there + back) / 2 + 500


def test_a_step_of_a_clock_is_seen_and_bounded() -> None:
    pause = 3 * SECOND  # the one clock stood still meanwhile: the other is ahead by more afterwards
    trips = [round_trip(n * SECOND // 10, (500, 10, 700), 0 if n < 20 else pause, 0) for n in range(40)]
    found = ClockMap(Limits.of(trips))
    assert found.steps == 1
    assert abs(found.at(SECOND)[0]) <= found.at(SECOND)[1] <= 1000
    guess, bound = found.at(3 * SECOND)
    assert abs(guess - pause) <= bound <= 1000
    guess, bound = found.at(19 * SECOND // 10 + 50_000_000)  # between the last before and the first after
    assert guess - bound <= 1000
    assert guess + bound >= pause - 1000


def test_a_rate_that_wanders_widens_the_bound() -> None:
    def wandering(at: int) -> float:
        return 2e-17 * at * at / 2  # 20 ppm more after 1,000 s: far more than WANDER

    trips = []
    for n in range(100):
        at = n * 10 * SECOND
        moved = round(wandering(at))
        trips.append(RoundTrip(at, at + 1000, at + 500 + moved, at + 500 + moved))
    found = ClockMap(Limits.of(trips))
    for n in range(0, 990, 7):
        guess, bound = found.at(n * SECOND)
        assert abs(guess - wandering(n * SECOND)) <= bound


@given(st.lists(st.tuples(*[st.integers(0, (1 << 64) - 1)] * 4), min_size=1, max_size=20),
       st.integers(0, (1 << 64) - 1))
def test_whatever_a_writer_claims_gives_a_bound(claims: list[tuple[int, int, int, int]], at: int) -> None:
    try:
        found = ClockMap(Limits.of(RoundTrip(*claim) for claim in claims))
    except ValueError:
        return
    _, bound = found.at(at)
    assert bound >= 0


def test_one_way_is_not_enough() -> None:
    limits = Limits([], [])
    limits.there(1, 2)
    with pytest.raises(ValueError, match="both ways"):
        ClockMap(limits)
