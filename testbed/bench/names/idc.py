"""The IDC API: transactions by handlers in the core and in Python, one and many at a time; beside ring and sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from idc.measure.calls import CALLS, PUMP, STREAM, TCP
from testbed.bench.groups import Group
from testbed.bench.names import Bench
from testbed.bench.subjects import (
    bulk,
    face,
    framed_round_trip,
    round_trip,
    socket_round_trip,
    socket_stream,
    stream,
    transact,
)

if TYPE_CHECKING:
    from testbed.bench.groups import Pace
    from testbed.bench.places import Place
    from testbed.bench.subjects import Subject

SIZE, MANY = 64, 64
MODES = ("poll", "doorbell", "adaptive")
TCP_CALLS, TCP_STREAMS = (64, 64 << 10), (64 << 10, 1 << 20)
BULK_SIZES = (4096, 16 << 10, 64 << 10, 256 << 10, 1 << 20)


def groups(place: Place, pace: Pace) -> list[Group]:
    """Transactions in one group, so that all take turns; then bulk, one group for each size."""
    del pace
    pair = place.pair
    for name in (CALLS, PUMP):
        pair.meet(name)
    subjects: list[Subject] = [round_trip(pair, "poll", "core", SIZE, name="transact", path="ring")]
    subjects += [transact(pair, mode, api, SIZE, outstanding)
                 for outstanding in (1, MANY) for api in ("core", "python") for mode in MODES]
    subjects += [socket_round_trip(pair, path, "python", SIZE, name="transact", polls=polls) for path in place.sockets
                 for polls in (False, True)]
    return [Group(f"transactions of {SIZE} bytes", pair, subjects), *(_bulk(place, size) for size in BULK_SIZES),
            *_tcp(place)]


def _bulk(place: Place, size: int) -> Group:
    pair = place.pair
    subjects: list[Subject] = [stream(pair, "poll", "core", size, name="bulk", path="ring")]
    subjects += [bulk(pair, strategy, size, touched=touched)
                 for touched in (False, True) for strategy in ("copy", "map", "handover")]
    subjects += [bulk(pair, "copy", size, touched=touched, api="core") for touched in (False, True)]
    return Group(f"bulk transfers of {size} bytes", pair, subjects)


def _tcp(place: Place) -> list[Group]:
    """The API without shared memory, beside plain sockets that carry the same."""
    if not place.tcp:
        return []
    pair = place.pair
    for name in (TCP, STREAM):
        pair.meet(name, address=place.tcp_address())
    if "tcp" not in place.sockets:
        where = place.tcp_address()
        place.connect("tcp", where, where)
    calls = [Group(f"transactions of {size} bytes over TCP", pair,
                   [transact(pair, None, "python", size, path=TCP, name=TCP), framed_round_trip(pair, "tcp", size)])
             for size in TCP_CALLS]
    streams = [Group(f"the stream face over TCP in pieces of {size} bytes", pair,
                     [face(pair, size), socket_stream(pair, "tcp", "python", size, name="face")])
               for size in TCP_STREAMS]
    return calls + streams


BENCH = Bench("idc", "transactions and bulk transfers of the IDC API", groups=groups, order=40)
