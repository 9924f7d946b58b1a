"""The permutation tests against scipy's, and against what they promise: few false alarms, and real changes found."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from testbed.results import permutation

Floats = NDArray[np.float64]
LEVEL = 0.01


def mean_difference(one: Floats, two: Floats) -> float:
    return abs(float(np.mean(one) - np.mean(two)))


@pytest.mark.parametrize("seed", range(5))
def test_paired_is_what_scipy_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_FAR", np.inf)  # scipy knows none
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(9, 3)), rng.normal(0.5, 1, size=(9, 3))
    ours = permutation.paired(second - first)
    for row in range(3):
        theirs = stats.permutation_test((second[:, row], first[:, row]), mean_difference, n_resamples=np.inf,
                                        permutation_type="samples", alternative="greater")
        assert ours.alone[row] == pytest.approx(theirs.pvalue)
    assert ours.least == 2 / 2**9


@pytest.mark.parametrize(("turns", "others"), [(5, 5), (4, 7), (2, 2)])
def test_apart_is_what_scipy_says(turns: int, others: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_FAR", np.inf)
    rng = np.random.default_rng(turns)
    first, second = rng.normal(size=(turns, 4)), rng.normal(1, 1, size=(others, 4))
    ours = permutation.apart(first, second)
    for row in range(4):
        theirs = stats.permutation_test((first[:, row], second[:, row]), mean_difference, n_resamples=np.inf,
                                        permutation_type="independent", alternative="greater")
        assert ours.alone[row] == pytest.approx(theirs.pvalue)


def test_too_many_ways_are_drawn_and_say_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    differences = np.random.default_rng(1).normal(0.4, 1, size=(12, 2))
    exact = permutation.paired(differences)
    monkeypatch.setattr(permutation, "MOST_WAYS", 4000)
    drawn = permutation.paired(differences)
    assert drawn.least == 1 / 4001, "the real labels count too, so no probability is 0"
    assert drawn.alone == pytest.approx(exact.alone, abs=0.04)
    assert drawn.among == pytest.approx(exact.among, abs=0.04)
    apart = permutation.apart(differences[:8], differences[4:])
    assert np.all(apart.alone >= 1 / 4001)


def test_one_row_is_its_own_correction_and_more_rows_never_help() -> None:
    differences = np.random.default_rng(2).normal(0.5, 1, size=(10, 30))
    alone = permutation.paired(differences[:, :1])
    assert alone.among == pytest.approx(alone.alone)
    many = permutation.paired(differences)
    assert np.all(many.among >= many.alone)
    assert many.alone[0] == alone.alone[0]


def test_what_is_all_the_same_is_no_difference() -> None:
    for tested in (permutation.paired(np.zeros((8, 2))), permutation.apart(np.ones((5, 2)), np.ones((5, 2)))):
        assert np.all(tested.alone == 1)
        assert np.all(tested.among == 1)
    assert np.all(permutation.noise_paired(np.ones((8, 2))) == 0)


def test_most_turns_on_one_spot_hide_no_clear_difference() -> None:
    """Clocks and doorbells come in steps, so that many turns have the very same figure."""
    first, second = np.zeros((6, 1)), np.full((4, 1), 0.1)
    assert permutation.apart(first, second).alone[0] == pytest.approx(1 / 210)


def measured(rng: np.random.Generator, turns: int, spread: Floats, *, drift: float = 0.02) -> tuple[Floats, Floats]:
    """Logarithms of two equals' figures as they come: a drift that neighbours share, noise by row, and stalls."""
    shape = (turns, len(spread))
    common = 10 + np.cumsum(rng.normal(0, drift, size=(turns, 1)), axis=0)

    def one() -> Floats:
        stalls = rng.exponential(0.5, size=shape) * (rng.random(shape) < 0.03)
        return np.asarray(common + rng.normal(0, spread, size=shape) + stalls)

    return one(), one()


@pytest.mark.parametrize("design", ["paired", "apart"])
def test_noise_is_seldom_called_a_difference(design: str) -> None:
    """Of 400 comparisons of equals, 20 rows each, one in a hundred may have a row that looks different: 4. Chance gives
    more than 11 less than once in a thousand times; the seed is fixed."""
    rng = np.random.default_rng(3)
    alarms = 0
    for _ in range(400):
        spread = rng.uniform(0.005, 0.1, size=20)
        if design == "paired":
            first, second = measured(rng, 12, spread)
            tested = permutation.paired(second - first)
        else:
            tested = permutation.apart(*measured(rng, 5, spread, drift=0.0))
        alarms += bool(np.any(tested.among <= LEVEL))
    assert alarms <= 11


def test_a_tenth_is_found_among_many_rows() -> None:
    """One row of 40 is slower by 10 %, in turns that vary by 2 % and stall now and then; twelve turns of each."""
    rng = np.random.default_rng(4)
    found = wrong = 0
    for _ in range(100):
        first, second = measured(rng, 12, np.full(40, 0.02))
        second[:, 7] += np.log(1.1)
        called = permutation.paired(second - first).among <= LEVEL
        found += bool(called[7])
        wrong += bool(np.any(np.delete(called, 7)))
    assert found >= 80
    assert wrong <= 5


def test_the_effect_and_its_bounds_hold_what_is_true() -> None:
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(100):
        first, second = rng.normal(0, 0.03, size=(12, 1)), rng.normal(np.log(1.1), 0.03, size=(12, 1))
        effect, low, high = permutation.effect_paired(second - first)
        assert low[0] <= effect[0] <= high[0]
        inside += bool(low[0] <= np.log(1.1) <= high[0])
    assert inside >= 85, "of 95 in theory; the bootstrap of a median of twelve is a little narrow"
    effect, low, high = permutation.effect_apart(first, second)
    assert effect[0] == pytest.approx(np.log(1.1), abs=0.05)
    assert low[0] < effect[0] < high[0]


def test_a_change_is_no_noise() -> None:
    differences = np.random.default_rng(7).normal(0, 0.03, size=(12, 5))
    assert permutation.noise_paired(differences + 1.0) == pytest.approx(permutation.noise_paired(differences))


def test_the_noise_of_a_pair_holds_95_of_100_effects_of_equals() -> None:
    rng = np.random.default_rng(8)
    differences = rng.normal(0, 0.03, size=(12, 1000))
    inside = np.abs(permutation.effect_paired(differences)[0]) <= permutation.noise_paired(differences)
    assert 0.92 <= inside.mean() <= 0.99


def test_a_step_is_that_of_neighbours_where_the_machine_is_twice_as_fast_at_times() -> None:
    fast = np.array([[0.0, 0.0, 0.0, 0.7, 0.7, 0.7]])
    change = np.array([[0.1, 0.1, 0.8, 0.1, 0.1, 0.1]])  # between the third two takes the machine changed
    assert permutation.step(fast, fast + change) == pytest.approx(0.1)


def test_the_noise_is_what_a_shows_against_itself() -> None:
    rng = np.random.default_rng(6)
    quiet, loud = (permutation.noise_paired(rng.normal(0, spread, size=(12, 50))).mean() for spread in (0.014, 0.14))
    assert loud == pytest.approx(10 * quiet, rel=0.3)
    assert 0.005 < quiet < 0.02
    assert np.isinf(permutation.noise_paired(np.zeros((1, 1)))[0]), "one turn says nothing of noise"
    assert np.all(permutation.noise_apart(rng.normal(0, 0.01, size=(5, 3)), 5) < 0.05)
