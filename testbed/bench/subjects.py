"""What can be measured between two ends, each taken for some tenths of a second at a time: `Subject.take(seconds)`.

Depends on `testbed.bench.ends`. The commands are those of `idc.measure.worker`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from idc.measure.calls import CALLS, TCP
from idc.measure.plain import BATCH
from testbed.bench.ends import BULK, RING_BYTES, SLOTS, Pair, Ran

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    Commands = Callable[[int, int, int], tuple[dict[str, Any], dict[str, Any] | None]]

#: How much of a sample the clock may be before several round trips share one.
CLOCK_SHARE = 0.05
#: Samples of one take, at most: more say nothing more, and have to come out of the VM.
MOST_SAMPLES = 20_000
#: Operations thrown away before those that count, as a part of them.
WARM_PART = 0.05
#: Share of the closed loop's rate that an open loop is sent at.
OPEN_SHARE = 0.5
#: ns from one to the next where messages are rare: longer than anybody polls.
RARE_NS = 2_000_000
#: Seconds of a take in which they are: 70 ms would be 35 messages.
RARE_SECONDS = 0.3
#: Bulk transfers under way at a time: the next is announced while one is consumed.
BULK_DEPTH = 2
#: What pieces the ring publishes: a larger one goes in several, and so may the limit's.
PIECE = 32 << 10


@dataclass(frozen=True)
class Key:
    """What makes a row one row; see `testbed.bench.rows.Row`."""

    name: str
    path: str
    mode: str | None
    api: str
    size: int
    unit: str
    outstanding: int | None = None
    strategy: str | None = None
    route: str | None = None
    touched: bool | None = None


@dataclass
class Taken:
    """One take.

    Attributes:
        samples: ns, where single operations were timed.
        value: operations, messages or bytes a second, where they were not.
        warmup: operations before, thrown away.
        used: processor seconds by place, see `Row.cpu`.
        host_units: 1,000 operations, or GBs, that the host's seconds are for: it counts the warm-up too.
        own_units: those that the ends' own are for.
        late: see `Row.late`.
        offered: see `Row.offered`.
    """

    samples: array[int] | None = None
    value: float | None = None
    warmup: int = 0
    used: dict[str, float] = field(default_factory=dict)
    host_units: float = 0.0
    own_units: float = 0.0
    late: int = 0
    offered: float | None = None


class Subject(Protocol):
    """One thing to measure. `variant` tells several ways to the same row apart; the best becomes the row."""

    key: Key
    variant: str
    note: str
    per: int

    def prepare(self, seconds: float) -> int:
        """Find out how many operations fit into so many seconds; returns how many that took, which are warm-up."""
        ...

    def take(self, seconds: float) -> Taken:
        """Measure for about so long."""
        ...


class Loop:
    """Both workers run matching loops, with as many operations as fit.

    Args:
        pair: the ends.
        key: of the row.
        commands: (operations, round trips in a sample, operations to warm up) to the near and the far command.
        each: what one operation is worth: 1 round trip or message, or bytes.
        first: operations of the first try.
        variant, note: see `Subject`.
    """

    def __init__(self, pair: Pair, key: Key, commands: Commands, *, each: int = 1, first: int = 64, variant: str = "",
                 note: str = "") -> None:  # fmt: skip
        self.pair = pair
        self.key = key
        self.variant = variant
        self.note = note
        self.per = 1
        self._commands = commands
        self.each = each
        self._first = first
        self._ns = 0.0
        self._sampled = key.unit == "ns"

    def prepare(self, seconds: float) -> int:
        """See `Subject`."""
        count, spent = self._first, 0
        while True:
            ran = self._run(count, 1, 0)
            spent += count
            self._ns = ran.near["ns"] / count
            # The first tries are mostly the two ends' start.
            if ran.near["ns"] >= seconds * 1e9 / 4 or count >= 1 << 24:
                break
            grow = seconds * 1e9 / 3 / ran.near["ns"]
            count = int(count * min(max(grow, 2), 16))
        # Once more, and the better counts: what stalled here would be too small a take there.
        self._ns = min(self._ns, self._run(count, 1, 0).near["ns"] / count)
        spent += count
        if self._sampled:
            self.per = max(1, math.ceil(self.pair.clock_ns / CLOCK_SHARE / self._ns))
        return spent

    def take(self, seconds: float) -> Taken:
        """See `Subject`."""
        count = max(int(seconds * 1e9 / self._ns), 8)
        warm = max(int(count * WARM_PART), 1)
        if self._sampled:
            count = max(min(count // self.per, MOST_SAMPLES), 1)
        ran = self._run(count, self.per, warm)
        done = count * self.per if self._sampled else count
        self._ns = ran.near["ns"] / done  # so that a stall in one take does not spoil the size of the next
        unit = (1e9 if self.key.unit == "B/s" else 1e3) / self.each
        taken = cost(ran, (done + warm) / unit, done / unit)
        taken.warmup = warm
        taken.late = ran.near.get("late", 0)
        if self._sampled:
            taken.samples = self.pair.samples()
        else:
            taken.value = done * self.each / (ran.near["ns"] / 1e9)
        return taken

    def _run(self, count: int, per: int, warm: int) -> Ran:
        return self.pair.run(*self._commands(count, per, warm))


class BareLoop(Loop):
    """One whose words must be zero, and whose doorbells unrung, before it starts."""

    def _run(self, count: int, per: int, warm: int) -> Ran:
        self.pair.far.ask(do="drain")
        self.pair.near.ask(do="clear")
        return super()._run(count, per, warm)


class OpenLoop(Loop):
    """Round trips that start by a timetable, whether or not the last one is back.

    Args:
        pair: the ends.
        mode: of the rings; None for the socket called `path`, of which one at a time is under way, timed from when it
            was due all the same.
        size: bytes.
        name, path: of the row.
        interval: ns from one to the next; None: OPEN_SHARE of what a closed loop just did.
    """

    def __init__(self, pair: Pair, mode: str | None, size: int, *, name: str = "rtt-open", path: str = "ivshmem",
                 interval: int | None = None) -> None:  # fmt: skip
        commands = (_rtt(SLOTS[size][0], "core", mode, size) if mode is not None
                    else _socket_rtt(path, "core", size, polls=False))
        super().__init__(pair, Key(name, path, mode, "core", size, "ns"), commands,
                         variant="" if mode else "plain socket")  # fmt: skip
        self._interval = interval

    def take(self, seconds: float) -> Taken:
        """See `Subject`."""
        self.per, probed = 1, 0
        if (interval := self._interval) is None:
            probe = max(int(seconds * 1e9 / 8 / self._ns), 8)
            self._ns = self._run(probe, 1, probe // 8 + 1).near["ns"] / probe
            probed, interval = probe + probe // 8 + 1, max(int(self._ns / OPEN_SHARE), 1)
        else:
            seconds = max(seconds, RARE_SECONDS)
        count = min(max(int(seconds * 1e9 / interval), 8), MOST_SAMPLES)
        warm = int(count * WARM_PART) + 1
        near, far = self._commands(count, 1, warm)
        paced = "paced" if self.key.mode else "socket_paced"
        given = ("channel", "name", "mode", "size", "count", "warm")
        near = {"do": paced, "interval": interval} | {key: near[key] for key in given if key in near}
        ran = self.pair.run(near, far)
        taken = cost(ran, (count + warm) / 1e3, count / 1e3)
        taken.warmup = probed + warm
        taken.samples = self.pair.samples()
        taken.offered = 1e9 / interval
        return taken


def cost(ran: Ran, host_units: float, own_units: float) -> Taken:
    """A take with its processor time, and of how many 1,000 operations or GBs that is: the host counts the warm-up
    too, the ends do not."""
    return Taken(used=dict(ran.cpu), host_units=host_units, own_units=own_units)


# -- what there is to measure


def _both(near: dict[str, Any], **far: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401 - JSON
    """The same command for both, each in its role; what is different at the far end."""
    return near | {"role": "near"}, near | {"role": "far"} | far


def _rtt(channel: str, api: str, mode: str, size: int) -> Commands:
    return lambda count, per, warm: _both(
        {"do": "rtt", "channel": channel, "api": api, "mode": mode, "size": size, "count": count, "per": per,
         "warm": -(-warm // per) * per})


def round_trip(pair: Pair, mode: str, api: str, size: int, *, name: str = "rtt", path: str = "ivshmem") -> Loop:
    """Messages there and back through the rings."""
    return Loop(pair, Key(name, path, mode, api, size, "ns"), _rtt(SLOTS[size][0], api, mode, size))


def transact(pair: Pair, mode: str | None, api: str, size: int, outstanding: int = 1, *, path: str = "ivshmem",
             name: str = CALLS) -> Loop:  # fmt: skip
    """Transactions, there and back: each timed where there is one at a time, else how many in a second."""
    unit = "ns" if outstanding == 1 else "txn/s"
    return Loop(pair, Key("transact", path, mode, api, size, unit, outstanding=outstanding),
                lambda count, per, warm: _both({"do": "transact", "api": api, "mode": mode, "size": size, "name": name,
                                                "count": count, "per": per, "warm": -(-warm // per) * per,
                                                "outstanding": outstanding}),
                note="parameters and status each of that size")  # fmt: skip


def framed_round_trip(pair: Pair, path: str, size: int) -> Loop:
    """Messages there and back over the plain socket called `path`, in Python, each with its length before it."""
    return Loop(pair, Key("transact", path, None, "python", size, "ns", outstanding=1),
                lambda count, per, warm: _both({"do": "framed_rtt", "name": path, "size": size, "count": count,
                                                "per": per, "warm": -(-warm // per) * per}),
                note="plain socket, length and message")  # fmt: skip


def face(pair: Pair, chunk: int) -> Loop:
    """Bytes one way by the stream face over the TCP transport."""
    return Loop(pair, Key("face", TCP, None, "python", chunk, "B/s"),
                lambda count, _, warm: _both({"do": "face", "chunk": chunk, "total": count * chunk,
                                              "warm": warm * chunk}),
                each=chunk, first=16, note="the stream face")  # fmt: skip


def bare_line(pair: Pair, size: int, *, name: str = "rtt") -> list[Subject]:
    """A cache line there and back, whatever `size` its row is put beside: the limit of polling. Two ways to poll."""
    return [_bare_line(pair, Key(name, "limit", "poll", "core", size, "ns"), gap) for gap in (False, True)]


def _bare_line(pair: Pair, key: Key, gap: bool) -> Loop:
    return BareLoop(pair, key, lambda count, per, warm: _both({"do": "line", "count": count, "per": per, "gap": gap,
                                                               "warm": -(-warm // per) * per}),
                    variant="a gap between polls" if gap else "polls without a gap",
                    note="8 bytes of one cache line each way")  # fmt: skip


def bare_bell(pair: Pair, size: int, *, name: str = "rtt") -> Loop:
    """A doorbell there and back: the limit of sleeping."""
    return BareLoop(pair, Key(name, "limit", "doorbell", "core", size, "ns"),
                    lambda count, per, warm: _both({"do": "bell", "count": count, "per": per,
                                                    "warm": -(-warm // per) * per}),
                    note="no data")  # fmt: skip


def rate(pair: Pair, mode: str, api: str, size: int, *, batch: bool = False) -> Loop:
    """Messages one way; of Python's, a `batch` in a call is a row of its own."""
    channel = SLOTS[size][0]
    return Loop(pair, Key("rate", "ivshmem", mode, api, size, "msg/s", outstanding=BATCH if batch else None),
                lambda count, _, warm: _both({"do": "rate", "channel": channel, "api": api, "mode": mode, "size": size,
                                              "count": count, "warm": warm, "batch": batch}),
                note=f"{BATCH} in a call" if batch else "")  # fmt: skip


def bulk(pair: Pair, strategy: str, size: int, *, touched: bool, api: str = "python") -> Loop:
    """Runs of region pages of the near end, which the far end copies to memory of its own, maps, or takes over."""
    key = Key("bulk", "ivshmem", "poll", api, size, "B/s", outstanding=BULK_DEPTH, strategy=strategy,
              route="direct", touched=touched)
    return Loop(pair, key,
                lambda count, _, warm: _both({"do": "bulk", "api": api, "strategy": strategy, "size": size,
                                              "touched": touched, "count": count, "warm": warm,
                                              "outstanding": BULK_DEPTH, "mode": "poll"}),
                each=size, first=16, note="the pages hold the data to begin with")  # fmt: skip


def stream(pair: Pair, mode: str, api: str, chunk: int, *, name: str = "stream", path: str = "ivshmem") -> Loop:
    """Bytes through the byte ring."""
    return Loop(pair, Key(name, path, mode, api, chunk, "B/s"),
                lambda count, _, warm: _both({"do": "stream", "channel": BULK, "api": api, "mode": mode, "chunk": chunk,
                                              "total": count * chunk, "warm": warm * chunk}),
                each=chunk, first=16)  # fmt: skip


@dataclass(frozen=True)
class CopyWay:
    """One way to move chunks: with which routine, over how many slots of which size."""

    routine: int
    slots: int
    piece: int


class CopyLoop(BareLoop):
    """A bare pipeline between both ends ("pipe"), or copies by the near end alone ("copy")."""

    def __init__(self, pair: Pair, key: Key, do: str, way: CopyWay) -> None:
        chunk = key.size
        routine = pair.near.facts["routines"][way.routine]

        def commands(count: int, _: int, __: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
            command = {"do": do, "tries": [_one(chunk, way, count)]}
            return _both(command) if do == "pipe" else (command, None)

        pieces = "" if way.piece == chunk else f" of {way.piece >> 10} KiB"
        super().__init__(pair, key, commands, each=chunk if key.unit == "B/s" else 1, first=16,
                         variant=f"{routine}, {way.slots} slots{pieces}")  # fmt: skip
        self.do = do
        self.way = way


def _one(chunk: int, way: CopyWay, count: int) -> dict[str, int]:
    return {"chunk": way.piece, "slots": way.slots, "routine": way.routine, "total": count * chunk}


def pipelines(pair: Pair, chunk: int, *, name: str = "stream", unit: str = "B/s") -> list[CopyLoop]:
    """Two loops that copy slots in and out and nothing else, the limit of a stream: each routine, over the same working
    set as the ring's and over the few slots that stay in the nearest cache; large chunks whole and in pieces."""
    key = Key(name, "limit", "pipeline", "core", chunk, unit)
    few = {8, SLOTS[chunk][2]} if unit == "msg/s" else {8}  # as many as the ring of such messages has
    return [CopyLoop(pair, key, "pipe", CopyWay(routine, number, piece)) for piece in sorted({chunk, min(chunk, PIECE)})
            for number in sorted({max(RING_BYTES // piece, 2), *(min(each, RING_BYTES // piece) for each in few)})
            for routine in range(len(pair.near.facts["routines"]))]


def copies(pair: Pair, chunk: int) -> list[CopyLoop]:
    """Local copies over the same working set, each routine: for orientation, no limit, since one end does it alone."""
    key = Key("stream", "limit", "copy", "core", chunk, "B/s")
    return [CopyLoop(pair, key, "copy", CopyWay(routine, max(RING_BYTES // chunk, 2), chunk))
            for routine in range(len(pair.near.facts["routines"]))]


def scout(pair: Pair, loops: list[CopyLoop], seconds: float, keep: int) -> tuple[list[CopyLoop], dict[str, float]]:
    """Try each way `seconds` long, twice, all in turn. The `keep` best, and what each did at best."""
    do, chunk, each = loops[0].do, loops[0].key.size, loops[0].each
    counts = [max((1 << 20) // chunk, 4)] * len(loops)
    rates = [0.0] * len(loops)
    for _ in range(3):  # the first only says how much fits
        if do == "pipe":
            pair.near.ask(do="clear")
        command = {"do": do, "tries": [_one(chunk, loop.way, count) for loop, count in zip(loops, counts, strict=True)]}
        ran = pair.run(*(_both(command) if do == "pipe" else (command, None)))
        found = [count / (ns / 1e9) for count, ns in zip(counts, ran.near["each"], strict=True)]
        rates = [max(pair) for pair in zip(rates, found, strict=True)]
        counts = [max(int(rate * seconds), 4) for rate in found]
    order = sorted(range(len(loops)), key=lambda index: -rates[index])
    return [loops[index] for index in order[:keep]], {loop.variant: rate * each
                                                      for loop, rate in zip(loops, rates, strict=True)}


def socket_round_trip(pair: Pair, path: str, api: str, size: int, *, polls: bool = False, name: str = "rtt") -> Loop:
    """Bytes there and back over the socket called `path`."""
    return Loop(pair, Key(name, path, None, api, size, "ns"), _socket_rtt(path, api, size, polls=polls),
                variant="plain socket, polled" if polls else "plain socket")


def _socket_rtt(path: str, api: str, size: int, *, polls: bool) -> Commands:
    return lambda count, per, warm: _both({"do": "socket_rtt", "name": path, "api": api, "size": size, "count": count,
                                           "per": per, "warm": -(-warm // per) * per, "polls": polls})


def socket_stream(pair: Pair, path: str, api: str, chunk: int, *, name: str = "stream") -> Loop:
    """Bytes one way over the socket called `path`."""
    return Loop(pair, Key(name, path, None, api, chunk, "B/s"),
                lambda count, _, warm: _both({"do": "socket_stream", "name": path, "api": api, "chunk": chunk,
                                              "total": count * chunk, "warm": warm * chunk}),
                each=chunk, first=16, variant="plain socket")  # fmt: skip


def socket_rate(pair: Pair, path: str, api: str, size: int, *, batch: bool = False) -> Loop:
    """Messages one way over the socket called `path`: a send and a receive for each, or for a batch of them. The core's
    ring decides by itself when to tell of messages, so there the better of the two is its peer; in Python who calls
    decides, and each is a row."""
    number = BATCH if batch else 1
    chunk = size * number
    return Loop(pair, Key("rate", path, None, api, size, "msg/s",
                          outstanding=BATCH if batch and api == "python" else None),
                lambda count, _, warm: _both({"do": "socket_stream", "name": path, "api": api, "chunk": chunk,
                                              "total": count * chunk, "warm": warm * chunk}),
                each=number,
                variant="plain socket, " + (f"{BATCH} in a send" if batch else "one send each"),
                note="bytes, which nobody takes apart into messages again" if batch else "")  # fmt: skip
