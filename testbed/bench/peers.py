"""What a user would pick instead, in its strongest set-up: sockperf and iperf3 over TCP between VMs, iceoryx2 between
processes. (Plain sockets are loops of the workers: `testbed.bench.subjects`.)

Both programs start anew for each take, and nothing of that start may count. What is timed begins after their warm-up:
sockperf's own, and the first intervals of iperf3. Processor time is a difference, since the host counts a whole QEMU:
of two lengths (sockperf), or against a run that moves next to nothing (iperf3). One that fails is a PeerFailed, which
costs its row and not the run. Depends on `testbed.vm` and `testbed.bench.subjects`.
"""

from __future__ import annotations

import json
import re
from array import array
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from testbed.bench import words
from testbed.bench.ends import Ran
from testbed.bench.errors import BenchFailed, PeerFailed
from testbed.bench.subjects import Key, Taken, cost
from testbed.errors import CommandFailed, TimedOut
from testbed.template_build import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.vm import Vm

SOCKPERF_PORT, IPERF_PORT = 7001, 5201
#: Seconds of one sockperf, which knows whole ones only; it warms up for 0.4 of them by itself and logs the rest.
SOCKPERF_SECONDS: Final = 1
#: Seconds of the two whose difference is what round trips cost.
COST_SECONDS: Final = (1, 3)
#: Processor seconds of that difference below which nothing is said of it.
LEAST_CPU: Final = 0.05
#: Seconds of one iperf3, which knows whole ones only, for --omit too (3.12); of how many the figure has nothing, for
#: slow start and for buffers that grow; and the shortest interval that it reports.
IPERF_SECONDS: Final = 1
IPERF_WARM: Final = 0.3
IPERF_INTERVAL: Final = 0.1


class Tool:
    """A program at both ends: a server in the one VM, its client in the other, started anew for each take."""

    program: str

    def __init__(self, near: Vm, far: Vm, address: str, key: Key, *, options: tuple[str, ...]) -> None:
        self.key = key
        self.variant = " ".join((self.program, *options))
        self.note = ""
        self.per = 1
        self._near = near
        self._far = far
        self._address = address
        self._options = options
        self._ready = False

    def prepare(self, seconds: float) -> int:
        """What its processor time is to be told from, the first time. It warms up by itself. Raises PeerFailed."""
        del seconds
        with self._theirs():
            if not self._ready:
                if self._near.execute(f"command -v {self.program}").exit_code != 0:
                    raise PeerFailed(f"{self.program}: the VMs' image does not have it", self)
                self._weigh()
            self._ready = True
        return 0

    def take(self, seconds: float) -> Taken:
        """See `Subject`; of the program's own length, whatever `seconds` is. Raises PeerFailed."""
        del seconds
        with self._theirs():
            return self._take()

    def _weigh(self) -> None:
        raise NotImplementedError

    def _take(self) -> Taken:
        raise NotImplementedError

    @contextmanager
    def _theirs(self) -> Iterator[None]:
        """What goes wrong with it, in VMs that are well, is its own."""
        try:
            yield
        except (BenchFailed, CommandFailed, TimedOut, TimeoutError) as error:
            if not (self._near.alive and self._far.alive):
                raise
            said = error.message if isinstance(error, (BenchFailed, CommandFailed, TimedOut)) else "it did not end"
            raise PeerFailed(f"{self.variant}, {self.key.name} of {words.size(self.key.size)}: {said}", self) from error

    def _both(self, server: list[str], port: int, client: list[str], *, ends: bool = False) -> tuple[str, str, Ran]:
        """What the client printed, and the server where it `ends` with its client; what both VMs used meanwhile."""
        running = self._far.spawn(server)
        try:
            self._far.wait_until_succeeds(f"ss -Hltn sport = {port} | grep -q .", every=0.05)
            before = [cpu_seconds(vm.pid) for vm in (self._near, self._far)]
            output = self._near.succeed(client, timeout=60)
            used = [cpu_seconds(vm.pid) - start for vm, start in zip((self._near, self._far), before, strict=True)]
            said = running.wait(30).out if ends else ""
        finally:
            running.kill()
            running.wait(30)
        return output, said, Ran({}, {}, {"host_near": used[0], "host_far": used[1]})


def _less(ran: Ran, other: Ran) -> Ran:
    """What it used more than another, by place."""
    return Ran({}, {}, {place: seconds - other.cpu[place] for place, seconds in ran.cpu.items()})


class Sockperf(Tool):
    """sockperf's ping-pong over TCP: each round trip from its log of all of them.

    A take's processor time is mostly its start, its warm-up and its log, so what a round trip costs is measured once,
    before the turns and without a log: what a longer run used more than a shorter one, by the round trips that it had
    more. `cost=False` saves the time for that (10 s).
    """

    program = "sockperf"
    _LOG = "/tmp/sockperf.csv"

    def __init__(self, near: Vm, far: Vm, address: str, size: int, *options: str, cost: bool = True) -> None:
        super().__init__(near, far, address, Key("rtt", "tcp", None, "core", size, "ns"), options=options)
        self._wants_cost = cost
        self._cost = Taken()

    def _weigh(self) -> None:
        if self._wants_cost:
            (few, short), (many, long) = (self._ping(seconds) for seconds in COST_SECONDS)
            more = _less(long, short)
            if many > few and sum(more.cpu.values()) >= LEAST_CPU:
                self._cost = cost(more, (many - few) / 1e3, (many - few) / 1e3)

    def _take(self) -> Taken:
        self._ping(SOCKPERF_SECONDS, "--full-log", self._LOG)
        samples = parse_sockperf_log(self._near.succeed(f"cat {self._LOG} && rm {self._LOG}"))
        return replace(self._cost, samples=samples)

    def _ping(self, seconds: int, *log: str) -> tuple[int, Ran]:
        """Round trips, warm-up and all; and what they used."""
        where = ["--tcp", "-i", self._address, "-p", str(SOCKPERF_PORT)]
        text, _, ran = self._both(["sockperf", "server", *where, *self._options], SOCKPERF_PORT,
                                  ["sockperf", "ping-pong", *where, "-m", str(self.key.size), *self._options, "-t",
                                   str(seconds), "--full-rtt", *log])  # fmt: skip
        return parse_sockperf_count(text), ran


def parse_sockperf_log(text: str) -> array[int]:
    """Round trips in ns from sockperf's full log, whose times are in seconds. Raises BenchFailed if it has none."""
    samples = array("Q")
    for line in text.splitlines():
        fields = line.split(", ")
        if len(fields) >= 3 and fields[0].isdigit():
            samples.append(round((float(fields[2]) - float(fields[1])) * 1e9))
    if not samples:
        raise BenchFailed(f"sockperf logged no round trip: {text[-200:]!r}")
    return samples


def parse_sockperf_count(text: str) -> int:
    """Round trips of a whole run, those of its warm-up too. Raises BenchFailed if it does not say."""
    found = re.search(r"\[Total Run\].*ReceivedMessages=(\d+)", text)
    if found is None:
        raise BenchFailed(f"sockperf did not say how many round trips there were: {text[-200:]!r}")
    return int(found.group(1))


class Iperf(Tool):
    """iperf3: bytes a second as the receiver counts them, once the connection is warm.

    What is subtracted from a take's processor time is a run of one write.
    """

    program = "iperf3"

    def __init__(self, near: Vm, far: Vm, address: str, chunk: int, *options: str) -> None:
        super().__init__(near, far, address, Key("stream", "tcp", None, "core", chunk, "B/s"), options=options)
        self._idle = Ran({}, {}, {})

    def _weigh(self) -> None:
        # The middle of three: one in which the VM had something else to do must not make all takes cheap.
        runs = [self._send("--bytes", str(self.key.size))[1] for _ in range(3)]
        self._idle = sorted(runs, key=lambda ran: sum(ran.cpu.values()))[1]

    def _take(self) -> Taken:
        text, ran = self._send("--time", str(IPERF_SECONDS))
        received = parse_iperf_intervals(text)
        taken = cost(_less(ran, self._idle), received.total / 1e9, received.total / 1e9)
        taken.value = received.rate
        taken.warmup = received.before // self.key.size
        return taken

    def _send(self, *length: str) -> tuple[str, Ran]:
        """What the server said, as JSON; and what both used."""
        port = ["--port", str(IPERF_PORT), "--json"]
        _, said, ran = self._both(["iperf3", "--server", "--one-off", *port, "--interval", str(IPERF_INTERVAL)],
                                  IPERF_PORT, ["iperf3", "--client", self._address, *port, *length,
                                               "--length", str(self.key.size), *self._options], ends=True)  # fmt: skip
        return said, ran


@dataclass(frozen=True)
class Received:
    """What a server of iperf3 counted.

    Attributes:
        rate: bytes a second after the warm-up.
        total: bytes, the warm-up's too.
        before: bytes of the warm-up.
    """

    rate: float
    total: int
    before: int


def parse_iperf_intervals(text: str) -> Received:
    """From the JSON of the end that receives, whose intervals are its own. Raises BenchFailed if none count."""
    try:
        found: list[dict[str, Any]] = [each["sum"] for each in json.loads(text)["intervals"]]
        late = [each for each in found if each["start"] >= IPERF_WARM - IPERF_INTERVAL / 2]
        seconds, counted = sum(float(each["seconds"]) for each in late), sum(int(each["bytes"]) for each in late)
        total = sum(int(each["bytes"]) for each in found)
    except (ValueError, KeyError, TypeError) as error:
        raise BenchFailed(f"iperf3 reported no intervals: {text[-300:]!r}") from error
    if seconds < (IPERF_SECONDS - IPERF_WARM) / 2 or counted <= 0:
        raise BenchFailed(f"iperf3 received {counted} bytes in {seconds:.2f} s after its warm-up, which is no figure")
    return Received(counted / seconds, total, total - counted)
