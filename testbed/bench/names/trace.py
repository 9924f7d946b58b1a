"""What tracing costs a round trip of the Python endpoints: off against a build without the hook, and on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.bench.groups import Group
from testbed.bench.names import Bench
from testbed.bench.tracing import Measurement, subjects

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place


def groups(place: Place, pace: Pace) -> list[Group]:
    """One, between processes: the differences are too small for a place where a round trip's time wanders."""
    if place.run is None:
        place.miss(f"tracing's cost ({place.pair.domains}): measured between processes only")
        return []
    measurement = Measurement(place.run, 0.6 if pace.quick else 5.0)
    return [Group("round trips with tracing off, and on", place.pair, [*subjects(measurement)])]


BENCH = Bench("trace", "what tracing costs", groups=groups, default=False, order=60)
