"""Messages one way, as many as go; beside bare slots copied in and out, and sockets that carry messages as small."""

from __future__ import annotations

from typing import TYPE_CHECKING

from testbed.bench.groups import Group
from testbed.bench.names import Bench
from testbed.bench.subjects import pipelines, rate, socket_rate

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place
    from testbed.bench.subjects import Subject

SIZE = 64
MODES = ("poll", "doorbell", "adaptive")


def groups(place: Place, pace: Pace) -> list[Group]:
    """One, in which all take turns."""
    del pace
    pair = place.pair
    subjects: list[Subject] = [rate(pair, mode, "core", SIZE) for mode in MODES]
    subjects += [rate(pair, mode, "python", SIZE, batch=batch) for mode in MODES for batch in (False, True)]
    subjects += [socket_rate(pair, path, api, SIZE, batch=batch) for path in place.sockets
                 for api in ("core", "python") for batch in (False, True)]
    limits = pipelines(pair, SIZE, name="rate", unit="msg/s")
    return [Group(f"messages of {SIZE} bytes one way", pair, subjects, scout=[limits])]


BENCH = Bench("rate", "messages one way", groups=groups, order=20)
