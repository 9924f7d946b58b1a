"""What the figures must show, judged from a result and nothing else: `judge(result)`. Pure.

Each bar compares two rows of one run, round by round: the median of the rounds' ratios counts, and their range is told.
One that it has no rows for is open: neither held nor failed.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from testbed.network import over_tap

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from testbed.bench.rows import Result, Row

MAIN = 64 << 10


@dataclass(frozen=True)
class Have:
    """What there is: `value`, and the least and the most of the rounds; None where they cannot be told apart."""

    value: float
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Bar:
    """One demand.

    Attributes:
        what: in words.
        need: bound of `ratio`: the figure by what it is measured against.
        sense: whether the ratio may be at most or must be at least that.
        ratio: of two figures, or one in its own unit; None if one of them was not measured.
    """

    what: str
    need: float
    sense: Literal["<=", ">="]
    ratio: Callable[[Result], Have | None]


@dataclass(frozen=True)
class Verdict:
    """A bar and what became of it: `held` is None where it is open."""

    bar: Bar
    have: float | None
    held: bool | None
    least: float | None = None
    most: float | None = None

    @property
    def range(self) -> str:
        """Of the rounds; a bar within it is not far from the other verdict."""
        return "" if self.least is None or self.most is None else f"{self.least:.3g}-{self.most:.3g}"


RowKey = tuple[str, str, str | None, str, int]


def _ratio(above: RowKey, *below: RowKey, domains: str, variants: str = "") -> Callable[[Result], Have | None]:
    """One row by another, see `by_rounds`; of several, by the best of those that were measured.

    With `variants`, by the best of those ways to the other row whose names start so, and not by the row's own.
    """

    def ratio(result: Result) -> Have | None:
        row = _find(result, above, domains)
        others = [found for key in below if (found := _find(result, key, domains)) is not None
                  and not _weak(result, found)]
        if row is None or not others:
            return None
        ratios = [ratio for other in others for ratio in _ratios(row, other, variants)]
        return (max if row.unit in ("ns", "us") else min)(ratios, key=lambda have: have.value, default=None)

    return ratio


def by_rounds(row: Row, other: Row) -> Have:
    """Of neighbours: the median of the rounds' ratios, since a machine that drifts moves both figures of a round alike.
    Of rows of which not every round is known, their figures'.
    """
    return _have(row.figure, row.rounds, other.figure, other.rounds)


def _have(above: float, aboves: Sequence[float], below: float, belows: Sequence[float]) -> Have:
    if aboves and len(aboves) == len(belows):
        ratios = [one / two for one, two in zip(aboves, belows, strict=True)]
        return Have(statistics.median(ratios), min(ratios), max(ratios))
    return Have(above / below)


def _ratios(row: Row, other: Row, variants: str) -> list[Have]:
    """By one row, or by the ways to it whose names start with `variants`: those tried only once have no rounds."""
    if not variants:
        return [by_rounds(row, other)]
    ways = other.variants or {other.variant: other.figure}
    return [by_rounds(row, other) if name == other.variant else Have(row.figure / figure)
            for name, figure in ways.items() if name.startswith(variants)]


def _weak(result: Result, other: Row) -> bool:
    """Whether it is TCP by less than it could be: over QEMU's sockets in place of TAPs, and no peer to judge by."""
    return (other.path, other.domains) == ("tcp", "vm-vm") and over_tap(result.host) is False


def _find(result: Result, key: RowKey, domains: str) -> Row | None:
    name, path, mode, api, size = key
    return result.find(name, path, domains, mode, api, size)


def _rtt(mode: str | None, *, path: str = "ivshmem", api: str = "core", name: str = "rtt") -> RowKey:
    return (name, path, mode, api, 64)


def _stream(path: str, mode: str | None, api: str = "core") -> RowKey:
    return ("stream", path, mode, api, MAIN)


def _adaptive(name: str, words: str, api: str = "core") -> Bar:
    rows = [_rtt(mode, name=name, api=api) for mode in ("adaptive", "poll", "doorbell")]
    return Bar(f"vm-vm: {api} adaptive by the better of polled and doorbell, {words}", 2.0, "<=",
               _ratio(*rows, domains="vm-vm"))


@dataclass(frozen=True)
class _Is:
    """What a row of the IDC API has to be."""

    name: str
    path: str
    mode: str | None
    api: str
    size: int
    outstanding: int | None = None
    strategy: str | None = None
    touched: bool | None = None

    def rates(self, result: Result, domains: str) -> tuple[float, list[float]] | None:
        """Of the row that is, and its rounds: operations or bytes a second."""
        for row in result.results:
            same = row.domains == domains and all(getattr(row, key) == value for key, value in vars(self).items())
            if same and not _weak(result, row):
                figure, *rounds = (1e9 / value if row.unit == "ns" else value for value in (row.figure, *row.rounds))
                return figure, rounds
        return None


def _times(what: str, above: _Is, below: _Is, need: float, domains: str = "vm-vm") -> Bar:
    """The rate of one row must be at least `need` times that of another."""

    def ratio(result: Result) -> Have | None:
        first, second = above.rates(result, domains), below.rates(result, domains)
        return None if first is None or second is None else _have(*first, *second)

    return Bar(f"{domains}: {what}", need, ">=", ratio)


def _slower(what: str, above: _Is, below: _Is, need: float) -> Bar:
    """One operation may take at most `need` times as long as one of another row."""
    bar = _times(what, below, above, need)  # their rates the other way round
    return Bar(bar.what, need, "<=", bar.ratio)


_MIB = 1 << 20
_CALL, _PYTHON_CALL = (_Is("transact", "ivshmem", "poll", api, 64, 1) for api in ("core", "python"))
_RUNG, _MANY_RUNG = (_Is("transact", "ivshmem", "doorbell", "core", 64, depth) for depth in (1, 64))

IDC_BARS = (
    _slower("transaction of 64 B in the core, polled, by the ring's round trip", _CALL,
            _Is("transact", "ring", "poll", "core", 64), 3.0),
    _slower("transaction of 64 B in Python, polled, by Python's TCP echo", _PYTHON_CALL,
            _Is("transact", "tcp", None, "python", 64), 1 / 6),
    _times("64 transactions outstanding by doorbell, core, by one by doorbell", _MANY_RUNG, _RUNG, 5.0),
    *(_times(f"bulk copy of 1 MiB, {words}, by the core's stream",
             _Is("bulk", "ivshmem", "poll", api, _MIB, 2, "copy", False), _Is("bulk", "ring", "poll", "core", _MIB),
             0.8)
      for api, words in (("core", "handler in the core"), ("python", "Python"))),
    *(_times(f"transactions of {size} B over TCP by a plain socket, Python",
             _Is("transact", "idc-tcp", None, "python", size, 1), _Is("transact", "tcp", None, "python", size, 1), 0.7,
             domains) for domains in ("process", "vm-vm") for size in (64, MAIN)),
    *(_times(f"stream face over TCP in pieces of {size} B by a plain socket, Python",
             _Is("face", "idc-tcp", None, "python", size), _Is("face", "tcp", None, "python", size), 0.7, domains)
      for domains in ("process", "vm-vm") for size in (MAIN, _MIB)),
)

def _told(polls: bool) -> str:
    """Of a device that is not as it is by default."""
    return ", told to poll," if polls else ""


def _network(name: str, what: str, mode: str, size: int, need: float, sense: Literal["<=", ">="]) -> tuple[Bar, Bar]:
    """The device by default, and told to poll: that by the better of what virtio-net was measured with."""

    def bar(polls: bool) -> Bar:
        peers = [(name, "virtio-net", other, "core", size) for other in (mode, f"{mode}-poll")]
        return Bar(f"vm-vm: {what} over {mode}, device net{_told(polls)} by virtio-net on TAP", need, sense,
                   _ratio((name, "ivshmem", f"{mode}-poll" if polls else mode, "core", size),
                          *(peers if polls else peers[:1]), domains="vm-vm"))

    return bar(False), bar(True)


NET_BARS = (
    *(bar for mode in ("ipv4", "ipv4-reverse", "ipv6", "ipv6-reverse")
      for bar in _network("net", "TCP", mode, 128 << 10, 1.5, ">=")),
    *(bar for mode in ("ipv4", "ipv6") for bar in _network("ping", "ping", mode, 64, 2 / 3, "<=")),
)


def _connect(mode: str, words: str, need: float) -> Bar:
    """Milliseconds, the median: what a user waits for."""

    def figure(result: Result) -> Have | None:
        row = _find(result, ("connect", "ivshmem", mode, "python", 0), "vm-vm")
        return None if row is None or row.p50 is None else Have(row.p50)

    return Bar(f"vm-vm: ms to connect a device, {words}, p50", need, "<=", figure)


def _disk(op: str, depth: int, need: float, *, polls: bool = False) -> Bar:
    """One row of "block" by the same over TCP: of the device as it is by default, or told to poll, and then by the
    better of what NBD over TCP was measured with."""

    def ratio(result: Result) -> Have | None:
        rows = {(row.path, row.mode): row for row in result.results
                if (row.name, row.op, row.depth) == ("block", op, depth)}
        own = rows.get(("ivshmem", "poll" if polls else None))
        peers = [rows.get(("nbd-tcp", mode)) for mode in ((None, "poll") if polls else (None,))]
        ratios = [by_rounds(own, peer) for peer in peers if own is not None and peer is not None]
        return min(ratios, key=lambda have: have.value, default=None)

    return Bar(f"vm-vm: block{_told(polls)} {op}, depth {depth}, by NBD over TCP", need, ">=", ratio)


def _traced(api: str, outstanding: int | None, words: str) -> tuple[Bar, Bar]:
    """What tracing costs transactions, %: nothing that can be told while it is off; little while it is on."""

    def found(name: str, mode: str) -> Callable[[Result], Have | None]:
        def figure(result: Result) -> Have | None:
            for row in result.results:
                if ((row.name, row.mode, row.api, row.outstanding, row.domains)
                        == (name, mode, api, outstanding, "process")):
                    return Have(abs(row.figure))
            return None

        return figure

    return (Bar(f"process: {words}, tracing off: %, the farther end of the 95 % interval", 2.0, "<=",
                found("trace-bound", "off")),
            Bar(f"process: {words}, tracing on: %", 15.0, "<=", found("trace-cost", "on")))


BARS = (
    Bar("vm-vm: core polled 64 B by the bare cache line", 3.0, "<=",
        _ratio(_rtt("poll"), _rtt("poll", path="limit"), domains="vm-vm")),
    Bar("vm-vm: core by doorbell 64 B by the bare doorbell", 1.3, "<=",
        _ratio(_rtt("doorbell"), _rtt("doorbell", path="limit"), domains="vm-vm")),
    _adaptive("rtt", "light load"),
    _adaptive("rtt-busy", "both VMs busy"),
    _adaptive("rtt-busy-rare", "both VMs busy, rare messages"),
    _adaptive("rtt", "light load", "python"),
    Bar("vm-vm: Python polled 64 B by Python's TCP echo", 0.1, "<=",
        _ratio(_rtt("poll", api="python"), _rtt(None, path="tcp", api="python"), domains="vm-vm")),
    Bar("vm-vm: core stream 64 KiB by the bare copy pipeline", 0.8, ">=",
        _ratio(_stream("ivshmem", "poll"), _stream("limit", "pipeline"), domains="vm-vm")),
    Bar("vm-vm: core stream 64 KiB by iperf3", 15.0, ">=",
        _ratio(_stream("ivshmem", "poll"), _stream("tcp", None), domains="vm-vm", variants="iperf3")),
    Bar("vm-vm: Python stream 64 KiB by Python's TCP stream", 10.0, ">=",
        _ratio(_stream("ivshmem", "poll", "python"), _stream("tcp", None, "python"), domains="vm-vm")),
    Bar("process: core polled 64 B by the bare cache line", 1.5, "<=",
        _ratio(_rtt("poll"), _rtt("poll", path="limit"), domains="process")),
    Bar("process: core stream 64 KiB by the bare copy pipeline", 0.8, ">=",
        _ratio(_stream("ivshmem", "poll"), _stream("limit", "pipeline"), domains="process")),
    *IDC_BARS,
    _connect("shared", "its link plugged before", 50.0),
    _connect("hotplug", "its link hot-plugged", 1500.0),
    *NET_BARS,
    *_traced("python", None, "Python round trip"), *_traced("core", None, "core round trip"),
    *_traced("core", 16, "core transactions, 16 under way"),
    _disk("randread", 1, 2.0), _disk("randread", 1, 2.0, polls=True),
    _disk("randread", 32, 2.0), _disk("randread", 32, 2.0, polls=True),
    _disk("seqread", 1, 5.0), _disk("seqwrite", 1, 5.0),
)


def judge(result: Result) -> list[Verdict]:
    """Each bar against the rows of one run."""
    verdicts = []
    for bar in BARS:
        if (have := bar.ratio(result)) is None:
            verdicts.append(Verdict(bar, None, None))
            continue
        held = have.value <= bar.need if bar.sense == "<=" else have.value >= bar.need
        verdicts.append(Verdict(bar, have.value, held, have.least, have.most))
    return verdicts
