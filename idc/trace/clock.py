"""Relates the clocks of two domains by what each must have seen before the other. Pure.

No event is seen before it happened. A ping sent at `a` and received at `b` says: at `a` of the one clock, the other was
at most at `b`; its answer says the like the other way. Each is a limit on the offset between the clocks, at one time;
the best round trip leaves half its duration of doubt, and doubt grows with the distance from it, by as much as the
clocks' rates can differ. The true offset lies within the bound if every limit is true and the assumptions hold:

- the rates differ by MAX_RATE at most, and that difference is constant but for WANDER;
- where limits contradict each other under that, a clock was stepped (a VM was paused, say): what lies before and after
  is taken apart, and the time between the two has a bound that covers both.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: Most by which the rates of two clocks differ: what Linux allows a clock to be slewed by.
MAX_RATE: Final = 500e-6
#: Most by which the difference of two rates varies.
WANDER: Final = 1e-6
#: Limits of each kind that the rate is estimated from, the best of as many equal spans of time.
_SPANS: Final = 128
#: Against rounding, ns.
_SLACK: Final = 1.0

Limit = tuple[int, int]


class RoundTrip(NamedTuple):
    """Four times, ns: sent and answer received by the one clock, received and answer sent by the other."""

    sent: int
    received: int
    came: int
    left: int


@dataclass
class Limits:
    """What is known of an offset: at a time, it is at most (`upper`) or at least (`lower`) that, ns.

    The offset is what has to be added to the one clock to have the other.
    """

    upper: list[Limit]
    lower: list[Limit]

    @classmethod
    def of(cls, round_trips: Iterable[RoundTrip]) -> Limits:
        """From the one that sends to the other."""
        limits = cls([], [])
        for trip in round_trips:
            limits.there(trip.sent, trip.came)
            limits.back(trip.left, trip.received)
        return limits

    def there(self, sent: int, came: int) -> None:
        """Something left at the one's time `sent`, and came at the other's `came`."""
        self.upper.append((sent, came - sent))

    def back(self, left: int, received: int) -> None:
        """Something left at the other's time `left`, and came at the one's `received`."""
        self.lower.append((received, left - received))

    def inverse(self) -> Limits:
        """The same from the other's point of view."""
        return Limits([(at + offset, -offset) for at, offset in self.lower],
                      [(at + offset, -offset) for at, offset in self.upper])


@dataclass
class _Segment:
    """Between two steps. Times and offsets are relative to the map's bases."""

    times: list[float]
    low: list[float]
    high: list[float]
    slowest: float = -MAX_RATE
    fastest: float = MAX_RATE

    def narrow(self) -> None:
        """Estimate the rate, then have each limit tell on all the others."""
        slowest, fastest = _rates(self)
        if slowest <= fastest:
            self.slowest, self.fastest = slowest - WANDER, fastest + WANDER
        if not self._spread():  # the rate varied by more than WANDER: only MAX_RATE is sure
            self.slowest, self.fastest = -MAX_RATE, MAX_RATE
            self._spread()

    def _spread(self) -> bool:
        low, high, last = self.low[:], self.high[:], len(self.times) - 1
        for i in range(1, last + 1):
            step = self.times[i] - self.times[i - 1]
            low[i] = max(low[i], low[i - 1] + self.slowest * step)
            high[i] = min(high[i], high[i - 1] + self.fastest * step)
        for i in range(last - 1, -1, -1):
            step = self.times[i + 1] - self.times[i]
            low[i] = max(low[i], low[i + 1] - self.fastest * step)
            high[i] = min(high[i], high[i + 1] - self.slowest * step)
        if any(least > most + _SLACK for least, most in zip(low, high, strict=True)):
            return False
        self.low, self.high = low, high
        return True

    def at(self, time: float) -> tuple[float, float]:
        """(least, most) offset."""
        i = bisect.bisect_right(self.times, time) - 1
        least, most = -math.inf, math.inf
        if i >= 0:
            step = time - self.times[i]
            least, most = self.low[i] + self.slowest * step, self.high[i] + self.fastest * step
        if i + 1 < len(self.times):
            step = self.times[i + 1] - time
            least = max(least, self.low[i + 1] - self.fastest * step)
            most = min(most, self.high[i + 1] - self.slowest * step)
        return least, most


class ClockMap:
    """The offset from one clock to another, at any time of the one.

    Args:
        limits: at least one of each kind.

    Attributes:
        steps: how often a clock was stepped.

    Raises:
        ValueError: a kind of limit is missing.
    """

    def __init__(self, limits: Limits) -> None:
        if not limits.upper or not limits.lower:
            raise ValueError("the clocks were not compared both ways")
        self._from, self._offset = limits.upper[0]
        points = [(float(at - self._from), -math.inf, float(offset - self._offset)) for at, offset in limits.upper]
        points += [(float(at - self._from), float(offset - self._offset), math.inf) for at, offset in limits.lower]
        points.sort()
        self._segments = [segment for segment in _segments(points) if not _blind(segment)]
        if not self._segments:
            raise ValueError("the clocks were not compared both ways between two steps of them")
        for segment in self._segments:
            segment.narrow()
        self._starts = [segment.times[0] for segment in self._segments]
        self.steps = len(self._segments) - 1

    def at(self, time: int) -> tuple[int, int]:
        """(offset, bound): at that time of the one clock, ns. The true offset is within `bound` of `offset`."""
        here = float(time - self._from)
        i = max(bisect.bisect_right(self._starts, here) - 1, 0)
        least, most = self._segments[i].at(here)
        if here > self._segments[i].times[-1] and i + 1 < len(self._segments):
            later = self._segments[i + 1].at(here)  # a step lies between: before or after this time
            least, most = min(least, later[0]), max(most, later[1])
        middle = round((least + most) / 2)
        return self._offset + middle, math.ceil(abs(most - least) / 2 + _SLACK)

    @property
    def drift(self) -> tuple[float, float]:
        """Least and most difference of rate in the last segment, parts in one."""
        last = self._segments[-1]
        return last.slowest, last.fastest


def _segments(points: Sequence[tuple[float, float, float]]) -> list[_Segment]:
    found: list[_Segment] = []
    low, high, before = math.inf, -math.inf, 0.0  # contradicts everything: the first point begins a segment
    for time, least, most in points:
        step = MAX_RATE * (time - before)
        low, high, before = max(low - step, least), min(high + step, most), time
        if low > high + _SLACK:
            low, high = least, most
            if found:
                _forget(found[-1], time, low, high)
            found.append(_Segment([], [], []))
        segment = found[-1]
        segment.times.append(time)
        segment.low.append(least)
        segment.high.append(most)
    return found


def _forget(segment: _Segment, time: float, low: float, high: float) -> None:
    """Drop from the end of a segment what may as well be of the next, which begins at `time` with these limits."""
    while segment.times:
        step = MAX_RATE * (time - segment.times[-1])
        if segment.low[-1] > high + step + _SLACK or segment.high[-1] < low - step - _SLACK:
            return
        for each in (segment.times, segment.low, segment.high):
            each.pop()


def _blind(segment: _Segment) -> bool:
    return max(segment.low, default=-math.inf) == -math.inf or min(segment.high, default=math.inf) == math.inf


def _rates(segment: _Segment) -> tuple[float, float]:
    """Least and most slope of a straight line that keeps all limits."""
    width = (segment.times[-1] - segment.times[0]) / _SPANS or 1.0
    uppers: dict[int, tuple[float, float]] = {}
    lowers: dict[int, tuple[float, float]] = {}
    for time, least, most in zip(segment.times, segment.low, segment.high, strict=True):
        span = int((time - segment.times[0]) / width)
        if most < math.inf and (span not in uppers or most < uppers[span][1]):
            uppers[span] = time, most
        if least > -math.inf and (span not in lowers or least > lowers[span][1]):
            lowers[span] = time, least
    slowest, fastest = -MAX_RATE, MAX_RATE
    for at_most, most in uppers.values():
        for at_least, least in lowers.values():
            if at_most > at_least:
                fastest = min(fastest, (most - least + _SLACK) / (at_most - at_least))
            elif at_least > at_most:
                slowest = max(slowest, (least - most - _SLACK) / (at_least - at_most))
    return slowest, fastest
