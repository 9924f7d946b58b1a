"""The IDC API: transactions by handlers in the core and in Python, one and many at a time; beside ring and sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc.measure.calls import CALLS, PUMP
from testbed.bench.groups import Group
from testbed.bench.names import Bench
from testbed.bench.subjects import round_trip, socket_round_trip, transact

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place
    from testbed.bench.subjects import Subject

SIZE, MANY = 64, 64
MODES = ("poll", "doorbell", "adaptive")


def groups(place: Place, pace: Pace) -> list[Group]:
    """Transactions in one group, so that all take turns."""
    del pace
    pair = place.pair
    for name in (CALLS, PUMP):
        pair.meet(name)
    subjects: list[Subject] = [round_trip(pair, "poll", "core", SIZE, name="transact", path="ring")]
    subjects += [transact(pair, mode, api, SIZE, outstanding)
                 for outstanding in (1, MANY) for api in ("core", "python") for mode in MODES]
    subjects += [socket_round_trip(pair, path, "python", SIZE, name="transact") for path in place.sockets]
    return [Group(f"transactions of {SIZE} bytes", pair, subjects)]


BENCH = Bench("idc", "transactions of the IDC API", groups=groups, order=40)
