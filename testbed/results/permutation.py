"""Whether two sets of figures differ by more than chance: permutation tests, effects, noise. Pure; depends on numpy.

The unit of all this is one *turn*: one start of the programs, whose thousands of samples gave one figure. Samples of
one turn share the memory, the moment and the neighbours they had, so they are no evidence of their own. Figures come
as logarithms, since what is asked is how many times as fast.

Two designs:

paired  turns of A and B alternated. Were there no difference, either of two neighbours might have been the other, so
        the sign of each turn's difference is tossed, in all ways (2 to the power of the turns). Where the takes within
        a turn alternated too, the turn's difference is the median of theirs (`step`).
apart   A and B were measured one after the other. Were there no difference, any turn might have been of either, so
        the labels are shuffled, in all ways (C(a+b, a)).

Many rows are tested at once, and one of a hundred would look changed by chance alone. So what counts is how often the
*largest* statistic of any row is as large, with all rows of a turn tossed together (Westfall and Young's single-step
maxT): the chance that a comparison of equals calls anything at all is held at the level asked for, however the rows
depend on each other, and a clear difference stays clear however many rows there are.

Why not scipy: its permutation_test knows no maximum over rows; what is left of it are the ten lines below, for 110 MB.
The tests hold these against it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: Ways to relabel that are tried: all, where there are no more than this; else so many at random.
MOST_WAYS: Final = 1 << 14
DRAWS: Final = 4000
SEED: Final = 20050416
#: Statistics nearer than this are the same one, summed in another order.
_SAME: Final = 1e-9
#: A turn that lies further out than so many times the median distance says nothing: one stall must not hide what all
#: others agree on. Which turns these are does not depend on the labels, so the test stays exact.
_FAR: Final = 3.0


@dataclass(frozen=True)
class Tested:
    """What a test says, by row.

    Attributes:
        alone: probability of a difference as clear as that in this row, were there none.
        among: the same of any row: corrected for how many there are.
        least: the smallest probability that so few turns can give.
    """

    alone: Floats
    among: Floats
    least: float


def step(first: Floats, second: Floats) -> Floats:
    """One difference for each turn, of logarithms of takes that were next to each other: turns x takes.

    Not the difference of the medians: a processor that is twice as fast for half of the takes moves a median far, and
    the difference of neighbours hardly, since both are mostly on the same side of such a change.
    """
    return np.asarray(np.median(second - first, axis=1))


def paired(differences: Floats) -> Tested:
    """`differences` of logarithms: turns x rows, at least one turn."""
    turns, _ = differences.shape
    counted = np.where(_near(np.abs(differences)), differences, 0.0)
    # |t| grows with the mean over the root of the mean square, which is between 0 and 1 and needs no division by a
    # variance that may be nothing.
    size = np.sqrt(turns * np.sum(counted**2, axis=0))
    size[size == 0] = 1.0
    signs, exact = _signs(turns)
    return _judge(np.abs(signs @ counted) / size, exact=exact, both=2)


def apart(first: Floats, second: Floats) -> Tested:
    """Logarithms of both: turns x rows, the same rows; at least one turn each."""
    pool = np.concatenate([first, second])
    pool -= np.median(pool, axis=0)
    pool = np.where(_near(np.abs(pool)), pool, 0.0)
    pool -= pool.mean(axis=0)
    size = np.sqrt(np.sum(pool**2, axis=0))
    size[size == 0] = 1.0
    one, two = len(first), len(second)
    labels, exact = _labels(one, two)
    # The mean of A less that of B, where the mean of all is nothing: the sum of A's by a constant.
    scale = math.sqrt(1 / one + 1 / two)
    # Shuffled in all ways, those that swap equal numbers of both are there twice already.
    return _judge(np.abs(labels @ pool) * scale / size, exact=exact, both=2 if one == two else 1)


def _near(distances: Floats) -> NDArray[np.bool_]:
    """Which turns count. Where most lie on the same spot, nothing is far."""
    bound = _FAR * np.median(distances, axis=0)
    return np.asarray((distances <= bound) | (bound == 0))


def _judge(statistics: Floats, *, exact: bool, both: int) -> Tested:
    """`statistics` by way and row, that of the real labels first. A random choice of ways counts the real one too.

    `both` ways at least give the same statistic: a difference the other way round is as good.
    """
    real, ways = statistics[0], len(statistics)
    alone = np.mean(statistics >= real - _SAME, axis=0)
    among = np.mean(statistics.max(axis=1)[:, None] >= real[None, :] - _SAME, axis=0)
    return Tested(alone, among, (both if exact else 1) / ways)


def _signs(turns: int) -> tuple[Floats, bool]:
    """All ways to toss the signs, the real one first; and whether these are all."""
    if 1 << turns <= MOST_WAYS:
        tossed = (np.arange(1 << turns)[:, None] >> np.arange(turns)) & 1
        return 1 - 2 * tossed.astype(np.float64), True
    signs = np.random.default_rng(SEED).integers(2, size=(MOST_WAYS, turns)).astype(np.float64) * 2 - 1
    return np.concatenate([np.ones((1, turns)), signs]), False


def _labels(one: int, two: int) -> tuple[Floats, bool]:
    """All ways to choose which turns are A's (1, else 0), the real one first; and whether these are all."""
    if (ways := math.comb(one + two, one)) <= MOST_WAYS:
        labels = np.zeros((ways, one + two))
        for way, chosen in enumerate(itertools.combinations(range(one + two), one)):
            labels[way, chosen] = 1.0
        return labels, True
    order = np.argsort(np.random.default_rng(SEED).random((MOST_WAYS, one + two)), axis=1) < one
    real = np.arange(one + two) < one
    return np.concatenate([real[None, :], order]).astype(np.float64), False


def effect_paired(differences: Floats) -> tuple[Floats, Floats, Floats]:
    """Median of the turns' differences, and the bounds that 95 of 100 bootstrap samples of turns have it in."""
    draws = np.random.default_rng(SEED).integers(len(differences), size=(DRAWS, len(differences)))
    return (np.median(differences, axis=0), *_bounds(np.median(differences[draws], axis=1)))


def effect_apart(first: Floats, second: Floats) -> tuple[Floats, Floats, Floats]:
    """Median of B less that of A, and its bounds; turns of both are drawn."""
    rng = np.random.default_rng(SEED)
    medians = [np.median(part[rng.integers(len(part), size=(DRAWS, len(part)))], axis=1) for part in (first, second)]
    return (np.median(second, axis=0) - np.median(first, axis=0), *_bounds(medians[1] - medians[0]))


def noise_paired(differences: Floats) -> Floats:
    """What two equals show as an effect, at most, in 95 of 100 comparisons of as many turns that scatter as these do.

    The turns' differences without their median, each as likely one way as the other. Not those of A's own turns, one
    after the other, which hold all that the machine did between two turns; two neighbours do not.
    """
    turns = len(differences)
    if turns <= 3:
        return np.full(differences.shape[1], math.inf)
    # So few say little of how they scatter: wider by as much as Student's t is, and by what the median took with it.
    left = (differences - np.median(differences, axis=0)) * math.sqrt(turns / (turns - 3))
    rng = np.random.default_rng(SEED)
    drawn = left[rng.integers(turns, size=(DRAWS, turns))] * rng.choice([-1.0, 1.0], size=(DRAWS, turns, 1))
    return _highest(np.median(drawn, axis=1))


def noise_apart(first: Floats, second_turns: int) -> Floats:
    """The same where B has so many turns, measured at another time: two draws of A's own turns."""
    if len(first) < 2:
        return np.full(first.shape[1], math.inf)
    rng = np.random.default_rng(SEED)
    medians = [np.median(first[rng.integers(len(first), size=(DRAWS, turns))], axis=1)
               for turns in (len(first), second_turns)]
    return _highest(medians[1] - medians[0])


def _bounds(drawn: Floats) -> tuple[Floats, Floats]:
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return low, high


def _highest(drawn: Floats) -> Floats:
    return np.asarray(np.quantile(np.abs(drawn), 0.95, axis=0))
