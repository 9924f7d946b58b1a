"""What a benchmark finds, as data: the JSON of `testbed bench --json` and the rows of its tables.

Pure; pydantic checks what comes back from a file. The fields up to `cpu_s` are the interface that others read; the rest
says how a figure came to be.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from testbed.errors import SpecError

#: Version of the JSON; raised when a field changes its meaning.
SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One thing measured. Round trips in ns with percentiles, everything else a `value` in its `unit`.

    Attributes:
        name: "rtt" (closed loop, nothing else running), "rtt-open" (sent by a timetable, at half of what that did),
            "rtt-rare" (one every 2 ms), "rtt-busy" and "rtt-busy-rare" (each VM's CPU shared with a burner), "rate",
            "stream"; "transact", "bulk" and "face" (the IDC API: transactions, bulk transfers, the stream face);
            "cold-boot", "clone", "clone-memory", "clone-memory-pss", "clone-idle"; "block" (fio on a disk); "net"
            (iperf3 over a network device), "ping"; "trace" (round trips of endpoints), "trace-cost" (what tracing
            adds), "trace-bound" (the farther end of its 95 % interval).
        path: "ivshmem", "limit", or a peer: "tcp", "vsock", "unix", "iceoryx2", "virtio-net"; "boot" of boots. Of
            "transact" and "bulk" also "ring" (a ring alone, the core's) and "idc-tcp" (the IDC API over its TCP
            transport).
        domains: "vm-vm", "host-vm", "process"; "vm" for boots.
        mode: "poll", "doorbell", "adaptive"; "pipeline" or "copy" for the limits of a stream; None for a peer;
            of traces "without" (the hook), "off", "on"; of "net" and "ping" the version of IP, "-reverse" from the far
            VM to the near one, and "-poll" of the device told to poll, or of a peer that was given the like of it; of
            "block" "poll" for that.
        api: "core" (loops in C) or "python".
        size: bytes of a message, of one write of a stream, of the parameters and of the status of a transaction, or of
            one bulk transfer.
        unit: "ns", "msg/s", "txn/s", "B/s", "Mbit/s" ("net"), "us" ("ping") and, of boots, "s", "MB", "%".
        samples: recorded in the histogram; of a `value`, the rounds it is the median of.
        p50, p90, p99, p999, max: of all samples of all rounds; see `told`.
        value: the median of the rounds.
        cpu_s: processor seconds of both ends, QEMUs included, as the host counts them: for 1,000 operations (rtt and
            rate), for a GB (stream). None where it was too short to count, or a load of ours ran beside.
        per: round trips in one sample, which is their mean. 1: a sample is one round trip.
        clock_ns: what one reading of the clock costs at the end that keeps the time; part of each sample.
        warmup: operations before, thrown away.
        rounds: p50 or value of each round, in the order they were taken.
        takes: of `bench --against`, by turn: p50 or value of each take, of which each had its like of the other version
            next to it. Empty where whole runs were alternated.
        variant: which of several ways this is, where several were tried: the best one.
        variants: all that were tried, with p50 or value.
        cpu: the same processor seconds by place: near and far (the ends' own processes, as they count themselves)
            and host_near, host_far (the whole QEMU or process, as the host counts).
        offered: operations a second that were asked for ("rtt-open").
        late: times that progress was found by the safety recheck and no doorbell; 0 unless one was lost.
        note: what a reader must know.
        outstanding: transactions under way at a time ("transact"); of "bulk", transfers; of "rate", messages in a call.
        strategy: "copy", "map" or "handover" ("bulk").
        route: how the bytes of "bulk" move: "direct" (both ends are members of the region).
        touched: whether the consumer of "bulk" summed every byte.
        op: of "block": "randread", "seqread", "seqwrite".
        depth: requests under way at a time ("block").
    """

    name: str
    path: str
    domains: str
    mode: str | None
    api: str
    size: int
    unit: str
    samples: int
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    p999: float | None = None
    max: float | None = None
    value: float | None = None
    cpu_s: float | None = None
    per: int = 1
    clock_ns: float | None = None
    warmup: int = 0
    rounds: tuple[float, ...] = ()
    takes: tuple[tuple[float, ...], ...] = ()
    variant: str = ""
    variants: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)
    offered: float | None = None
    late: int = 0
    note: str = ""
    outstanding: int | None = None
    strategy: str | None = None
    route: str | None = None
    touched: bool | None = None
    op: str | None = None
    depth: int | None = None

    @property
    def figure(self) -> float:
        """p50 of a row with percentiles, else the value."""
        found = self.p50 if self.p50 is not None else self.value
        assert found is not None, "one of the two is always there"
        return found

    @property
    def told(self) -> tuple[float | None, ...]:
        """p50, p90, p99, p99.9 and the maximum; None for one that has fewer than ten samples beyond it, which would be
        another name of the maximum."""
        tails = ((self.p90, 100), (self.p99, 1_000), (self.p999, 10_000))
        return (self.p50, *(value if self.samples >= least else None for value, least in tails), self.max)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: what was not measured is absent, but a mode of None is one."""
        return {key: value for key, value in dataclasses.asdict(self).items()
                if key == "mode" or value not in (None, "", (), {})}


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        accel: "tcg" or "kvm"; "none" where no VM took part.
        accel_reason: why that one.
        host: the machine and what ran on it; see `testbed.bench.facts`.
        results: the rows.
        quick: whether each row was only touched.
        started: UTC, ISO 8601.
        seconds: that the run took.
        absent: peers and rows that could not be measured here, and why.
        session: of `bench --against`: the same for both versions, whose turns were alternated; "" of any other run.
        version: of `bench --against`: "base" or "this"; every round of every row is then one whole run of its own.
        notes: what a reader must know of the run.
        schema: version of this object.
    """

    accel: str
    host: dict[str, Any]
    results: tuple[Row, ...]
    accel_reason: str = ""
    quick: bool = False
    started: str = ""
    seconds: float = 0.0
    absent: tuple[str, ...] = ()
    session: str = ""
    version: str = ""
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    def as_json(self) -> str:
        """The object as text."""
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return json.dumps(fields | {"results": [row.as_dict() for row in self.results]}, indent=1)

    def find(self, name: str, path: str, domains: str, mode: str | None, api: str, size: int | None) -> Row | None:
        """The row with these, if it was measured; `size` None takes any."""
        for row in self.results:
            same = (row.name, row.path, row.domains, row.mode, row.api) == (name, path, domains, mode, api)
            if same and size in (None, row.size):
                return row
        return None


_ADAPTER = TypeAdapter(Result)


def parse(text: str, source: str) -> Result:
    """A result from its JSON. Raises SpecError that names `source` and the field at fault."""
    try:
        result = _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise SpecError(f"{source} is no result of `testbed bench`: {where}: {first['msg']}") from error
    for index, row in enumerate(result.results):
        if (row.p50 is None) == (row.value is None):
            raise SpecError(f"{source} is no result of `testbed bench`: results.{index} needs percentiles or a value")
    return result


def json_schema() -> dict[str, Any]:
    """JSON schema of a result."""
    return _ADAPTER.json_schema()
