"""What a user would pick instead, in its strongest set-up: sockperf and iperf3 over TCP between VMs, iceoryx2 between
processes. (Plain sockets are loops of the workers: `testbed.bench.subjects`.)

Depends on `testbed.vm` and `testbed.bench.subjects`.
"""

from __future__ import annotations

import json
from array import array
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from testbed.bench.ends import Ran
from testbed.bench.errors import BenchFailed
from testbed.bench.subjects import Key, Taken, cost
from testbed.template_build import cpu_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.vm import Vm

SOCKPERF_PORT, IPERF_PORT = 7001, 5201
#: Seconds of one sockperf, which knows whole ones only; of which it warms up for 0.4 more by itself.
SOCKPERF_SECONDS = 1
#: A TCP stream shorter than this is mostly its start.
IPERF_LEAST = 0.3


class Tool:
    """A program at both ends: a server in the one VM, its client in the other, started anew for each take."""

    def __init__(self, near: Vm, far: Vm, address: str, key: Key, *, variant: str, options: tuple[str, ...]) -> None:
        self.key = key
        self.variant = variant
        self.note = ""
        self.per = 1
        self._near = near
        self._far = far
        self._address = address
        self._options = options

    def prepare(self, seconds: float) -> int:
        """Nothing: the programs warm up by themselves."""
        del seconds
        return 0

    @contextmanager
    def _server(self, argv: list[str], port: int) -> Iterator[None]:
        server = self._far.spawn(argv)
        try:
            self._far.wait_until_succeeds(f"ss -Hltn sport = {port} | grep -q .", every=0.05)
            yield
        finally:
            server.kill()
            server.wait(30)

    def _client(self, argv: list[str], timeout: float) -> tuple[str, Ran]:
        """Its output; and processor time, as the host counts, of both VMs meanwhile."""
        before = [cpu_seconds(vm.pid) for vm in (self._near, self._far)]
        output = self._near.succeed(argv, timeout=timeout)
        used = [cpu_seconds(vm.pid) - start for vm, start in zip((self._near, self._far), before, strict=True)]
        return output, Ran({}, {}, {"host_near": used[0], "host_far": used[1]})


class Sockperf(Tool):
    """sockperf's ping-pong over TCP: each round trip from its log of all of them."""

    _LOG = "/tmp/sockperf.csv"

    def __init__(self, near: Vm, far: Vm, address: str, size: int, *options: str) -> None:
        super().__init__(near, far, address, Key("rtt", "tcp", None, "core", size, "ns"),
                         variant=" ".join(("sockperf", *options)), options=options)  # fmt: skip

    def take(self, seconds: float) -> Taken:
        """See `Subject`; never shorter than SOCKPERF_SECONDS."""
        length = str(max(round(seconds), SOCKPERF_SECONDS))
        where = ["--tcp", "-i", self._address, "-p", str(SOCKPERF_PORT), "-m", str(self.key.size), *self._options]
        with self._server(["sockperf", "server", *where[:5], *self._options], SOCKPERF_PORT):
            _, ran = self._client(["sockperf", "ping-pong", *where, "-t", length, "--full-rtt", "--full-log",
                                   self._LOG], timeout=60)  # fmt: skip
        samples = parse_sockperf_log(self._near.succeed(f"cat {self._LOG} && rm {self._LOG}"))
        taken = cost(ran, len(samples) / 1e3, len(samples) / 1e3)
        taken.samples = samples
        return taken


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


class Iperf(Tool):
    """iperf3: as many bytes as fit into the time."""

    def __init__(self, near: Vm, far: Vm, address: str, chunk: int, *options: str) -> None:
        super().__init__(near, far, address, Key("stream", "tcp", None, "core", chunk, "B/s"),
                         variant=" ".join(("iperf3", *options)), options=options)  # fmt: skip
        self._rate = 0.0

    def prepare(self, seconds: float) -> int:
        """See `Subject`."""
        del seconds
        # Some hundredths of a second at least: of a run that is over at once iperf3 reports a rate of 0.
        total = 1 << 20 if self.key.size < 1024 else 16 << 20
        self._rate = self._run(total)[0]
        return total

    def take(self, seconds: float) -> Taken:
        """See `Subject`."""
        total = max(int(self._rate * max(seconds, IPERF_LEAST)), 1 << 20)
        rate, ran = self._run(total)
        taken = cost(ran, total / 1e9, total / 1e9)
        taken.value = rate
        return taken

    def _run(self, total: int) -> tuple[float, Ran]:
        with self._server(["iperf3", "--server", "--one-off", "--port", str(IPERF_PORT)], IPERF_PORT):
            text, ran = self._client(["iperf3", "--client", self._address, "--port", str(IPERF_PORT), "--json",
                                      "--bytes", str(total), "--length", str(self.key.size), *self._options],
                                     timeout=60)  # fmt: skip
        return parse_iperf(text), ran


def parse_iperf(text: str) -> float:
    """Bytes a second that were received. Raises BenchFailed if there are none."""
    try:
        report: dict[str, Any] = json.loads(text)
        rate = float(report["end"]["sum_received"]["bits_per_second"]) / 8
    except (ValueError, KeyError) as error:
        raise BenchFailed(f"iperf3 reported no rate: {text[-300:]!r}") from error
    if rate <= 0:
        raise BenchFailed("iperf3 received nothing")
    return rate

