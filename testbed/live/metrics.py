"""What `testbed top` shows as Prometheus metrics, by prometheus_client: names, units and labels are in docs/top.md.

    print(exposition(beds).decode())
    with serve(collector, "127.0.0.1", 9105): ...

Names of members' own making never become labels: all labels are names that the host gave, from a closed set, or bounded
by what there is at the moment; and beyond MOST series the rest is left out, and counted. Depends on testbed.live and
prometheus_client.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, generate_latest, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector as Exporter

from idc import layout
from idc.device.states import State
from testbed.errors import SpecError
from testbed.live.views import bucket_bound

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client.core import Metric

    from testbed.live.collect import BedNow, Collector, ProcessNow
    from testbed.live.memory import ChannelNow

#: Most series of one exposition.
MOST: Final = 20_000
#: Seconds for which a look serves: several scrapers cost no more than one.
FRESH: Final = 0.5
_PREFIX: Final = "idc_testbed_"
#: Counters of a ring's end: name in the record, of the metric, and what it says.
_RING: Final = (
    ("doorbells", "doorbells", "Doorbells that this end of a ring has rung"),
    ("suppressed", "doorbells_suppressed", "Progress that this end published with no doorbell: none was asked for"),
    ("sleeps", "sleeps", "Times that this end blocked"),
    ("wakeups", "wakeups", "Times that a doorbell woke this end"),
    ("spurious", "spurious_wakeups", "Times that a doorbell woke this end to nothing"),
    ("late", "late_wakeups", "Progress found by the safety recheck with no doorbell; 0 in health"),
    ("masked", "doorbells_masked", "Times that this end masked its doorbell, rung without end"),
    ("full", "ring_full", "Times that this end found no room"),
)


class _Families:
    """Metrics being gathered, each a family that is made when it first has a sample."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._left = MOST
        self.left_out = 0

    def gauge(self, name: str, text: str, value: float | None, **labels: str) -> None:
        """A value; None: there is none."""
        if value is not None and self._room():
            self._family(GaugeMetricFamily, name, text, labels).add_metric(list(labels.values()), value)

    def counter(self, name: str, text: str, value: float | None, **labels: str) -> None:
        """What only grows, unless what counts began anew; `name` without `_total`."""
        if value is not None and self._room():
            self._family(CounterMetricFamily, name, text, labels).add_metric(list(labels.values()), value)

    def histogram(self, name: str, text: str, bounds: Sequence[tuple[str, float]], total: float, **labels: str) -> None:
        """(bound, how many up to it), the last one "+Inf"."""
        if self._room(len(bounds) + 2):
            self._family(HistogramMetricFamily, name, text, labels).add_metric(list(labels.values()), bounds, total)

    def all(self) -> Iterable[Metric]:
        """Those that were made, and how much was left out."""
        text = f"Series that were left out, beyond {MOST}"
        left = GaugeMetricFamily(f"{_PREFIX}series_left_out", text, self.left_out)
        return [*self._made.values(), left]

    def _room(self, series: int = 1) -> bool:
        if self._left < series:
            self.left_out += series
            return False
        self._left -= series
        return True

    def _family(self, kind: type[Metric], name: str, text: str, labels: dict[str, str]) -> Any:  # noqa: ANN401
        if name not in self._made:
            self._made[name] = kind(_PREFIX + name, text, labels=list(labels))  # type: ignore[call-arg]
        return self._made[name]


def families(beds: Sequence[BedNow], took: float = 0.0) -> Iterable[Metric]:
    """Everything that one look has shown; `took` is how long that was, seconds."""
    made = _Families()
    made.gauge("testbeds", "Testbeds that run", len(beds))
    made.gauge("look_seconds", "How long it took to look at all of them", took)
    for bed in beds:
        made.gauge("up", "Whether the testbed's supervisor answers", not bed.trouble or bool(bed.vms), testbed=bed.name)
        _processes(made, bed)
        _regions(made, bed)
        _devices(made, bed)
    return made.all()


def _processes(made: _Families, bed: BedNow) -> None:
    for vm in bed.vms:
        made.gauge("vm_running", "Whether the VM's QEMU runs", vm.cpu is not None, testbed=bed.name, vm=vm.name,
                   accel=bed.accel)
        _process(made, vm, "vm", "QEMU", testbed=bed.name, vm=vm.name)
    for process in bed.processes:
        _process(made, process, "process", "the process", testbed=bed.name, process=process.name.replace(" ", "_"))


def _process(made: _Families, now: ProcessNow, prefix: str, who: str, **labels: str) -> None:
    if now.cpu is not None:
        made.counter(f"{prefix}_cpu_seconds", f"Processor time of {who}", now.cpu.seconds, **labels)
    if now.memory is not None:
        for name, value, text in (
                ("private", now.memory.private, f"Memory that {who} alone maps"),
                ("shared", now.memory.shared, f"Memory that {who} and others map"),
                ("proportional", now.memory.proportional, f"Memory of {who}, of shared pages its part (PSS)")):
            made.gauge(f"{prefix}_memory_{name}_bytes", text, value, **labels)


def _regions(made: _Families, bed: BedNow) -> None:
    for region in bed.regions:
        at = {"testbed": bed.name, "region": region.name}
        made.gauge("region_size_bytes", "Size of the region", region.told["size"], **at)
        made.gauge("region_memory_bytes", "Memory that the region takes", region.allocated, **at)
        for member in region.told["members"]:
            here = member["present"] if member["rights"] == "rw" else member["plugged"]
            made.gauge("region_member_present", "Whether the member is connected to the region; of a reader, plugged",
                       here, **at, member=member["name"])
        for pair in region.told["doorbell_faults"]:
            for what, count in pair.items():
                if what not in ("from", "to"):
                    made.counter("doorbell_faults", "Doorbells between two members, by what was done to them",
                                 count, **at, sender=pair["from"], receiver=pair["to"], fate=what)
        for channel in region.channels:
            _channel(made, channel, at | {"channel": channel.name})


def _channel(made: _Families, channel: ChannelNow, at: dict[str, str]) -> None:
    made.gauge("channel_connected", "Claimed: whether both sides are open and acknowledge each other",
               channel.connected, **at)
    for ring in channel.rings:
        way = at | {"producer": ring.producer, "consumer": ring.consumer}
        made.counter("ring_messages", "Claimed: messages that the consumer took, of this connection",
                     ring.head if channel.kind == "message" else None, **way)
        made.counter("ring_bytes", "Claimed: bytes that the consumer took, of this connection",
                     ring.taken["bytes"] if channel.kind == "message" else ring.head, **way)
        made.gauge("ring_fill_ratio", "Claimed: part of the ring that is filled",
                   None if ring.filled is None else ring.filled / ring.capacity, **way)
        for end, counts in (("producer", ring.sent), ("consumer", ring.taken)):
            for word, name, text in _RING:
                made.counter(name, f"Claimed: {text[0].lower()}{text[1:]}", counts[word], **way, end=end)
    for side in channel.sides:
        who = at | {"member": side.member}
        made.counter("endpoint_dropped", "Claimed: what this side had to drop, of this connection", side.dropped, **who)
        if not any(side.buckets):
            continue
        total, bounds = 0, []
        for number, count in enumerate(side.buckets):
            total += count
            last = number == layout.TRIP_BUCKETS - 1
            if last or number % 2:  # half of the bounds are enough
                bounds.append(("+Inf" if last else f"{bucket_bound(number):.12g}", total))
        made.histogram("endpoint_round_trip_seconds", "Claimed: from a transaction's submission to its answer, one in "
                       "eight of those of this connection", bounds, side.total_ns / 1e9, **who)


def _devices(made: _Families, bed: BedNow) -> None:
    for device in bed.devices:
        for role in ("front", "back"):
            steps = device["ends"][role]
            state = steps[0]["state"] if steps else State.CLOSED.value
            labels = {"testbed": bed.name, "class": device["class"], "number": device["number"],
                      "frontend": device["frontend"], "backend": device["backend"], "end": role}
            for each in State:
                made.gauge("device_state", "Claimed: the state of a device's end: 1 of the one that it is in",
                           each.value == state, **labels, state=each.value)


def exposition(beds: Sequence[BedNow], took: float = 0.0) -> bytes:
    """The text format, UTF-8."""

    class Once(Exporter):
        def collect(self) -> Iterable[Metric]:
            return families(beds, took)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry)


class _Live(Exporter):
    """Looks when it is asked, one asker at a time."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._lock = threading.Lock()
        self._at = 0.0
        self._last: Iterable[Metric] = ()

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: registering must not look."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Of now, or of a moment ago."""
        with self._lock:
            began = time.monotonic()
            if began - self._at >= FRESH or not self._last:
                beds = self._collector.look()
                self._at = time.monotonic()
                self._last = families(beds, self._at - began)
            return self._last


@dataclass(frozen=True)
class Serving:
    """Where it is served: the port is the one that was taken, also if 0 was asked for."""

    address: str
    port: int


@contextlib.contextmanager
def serve(collector: Collector, address: str, port: int) -> Iterator[Serving]:
    """Serve the metrics over HTTP, from threads, until the end of the block. Raises SpecError if that cannot be."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Live(collector))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise SpecError(f"cannot listen at {address}:{port}: {error.strerror or error}",
                        hint="another port; ss -ltnp shows who has this one") from error
    try:
        yield Serving(address, server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
