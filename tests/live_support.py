"""A testbed to look at that boots nothing: regions between members of this process, "VMs" that are sleeping processes.

It answers over a supervisor's socket what a supervisor would, by the supervisor's own code.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from region_support import DEADLINE, running, short_directory

from host import wire
from host.ivshmem.client import join
from host.region import RegionSpec
from idc.endpoint import Client, Endpoint, Quotas, Resources, State
from idc.layout import ChannelSpec, Kind, Rights
from idc.transport.shared import SharedPort
from testbed import operations, registry
from testbed.registry import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from idc.endpoint import IncomingTransaction

CHANNELS = (ChannelSpec("calls", Kind.MESSAGE, "front", "back", 64 * 256, 256),
            ChannelSpec("bulk", Kind.BYTE, "front", "back", 65536))
QUOTAS = Quotas(requests=8, messages=2, parameter_bytes=64, status_bytes=64)


class Echo(Client):
    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(transaction.parameters)


def endpoints(front: SharedPort, back: SharedPort) -> tuple[Endpoint, Endpoint]:
    """Both ends of a connection, connected."""
    pair = Endpoint(front, Client(), Resources(QUOTAS, requests=8)), Endpoint(back, Echo(), Resources(QUOTAS))
    deadline = time.monotonic() + DEADLINE
    while any(end.state is not State.CONNECTED for end in pair):
        for end in pair:
            end.pump()
        assert time.monotonic() < deadline
    return pair


def transact(front: Endpoint, back: Endpoint, count: int) -> None:
    """So many round trips, one after the other."""
    for _ in range(count):
        done: list[object] = []
        front.submit_transaction(b"0123456789", done.append)
        while not done:
            back.pump()
            front.pump()


class FakeVm:
    """What is looked at of a VM: a process that sleeps."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(["sleep", "1000"])
        self.spec = SimpleNamespace(cpus=1, memory=SimpleNamespace(mib=256))
        self.devices = frozenset({"iv-link"})

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def state(self) -> str:
        return "running" if self.alive else f"ended: signal {signal.Signals(-self.process.returncode).name}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class FakeBed:
    """What `describe` looks at, and a supervisor's socket.

    Attributes:
        answers: while cleared, nothing is answered.
        devices: what "devices" answers.
    """

    def __init__(self, name: str, directory: Path, service: Any, region: Any) -> None:
        self.name, self.service, self.regions = name, service, {region.name: region}
        self.vms = {vm: FakeVm(vm) for vm in ("front", "back")}
        self.verdict = SimpleNamespace(accel="tcg")
        self.broker_spec: object = object()
        self.devices: list[dict[str, Any]] = []
        self.answers = threading.Event()
        self.answers.set()
        self.directory = directory / name
        self.directory.mkdir()
        self._listener = wire.listen(self.directory / registry.SOCKET, socket.SOCK_SEQPACKET, backlog=8)
        self._listener.setblocking(True)
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.entry = Entry(name, str(self.directory), os.getpid(), time.time(), tuple(self.vms))
        registry.register(self.entry)

    def doorbells(self, _region: str) -> dict[tuple[str, str], object]:
        return {}

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setblocking(True)
            thread = threading.Thread(target=self._converse, args=[sock])
            self._threads.append(thread)
            thread.start()

    def _converse(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while (received := wire.receive_message(sock)) is not None:
                self.answers.wait()
                caller = operations.Caller(sock, received[1])
                if received[0]["op"] == "devices":
                    reply: dict[str, Any] = {"devices": self.devices}
                else:
                    bed: Any = self
                    reply = operations.OPERATIONS[received[0]["op"]](bed, caller, received[0])
                wire.send_message(sock, {"ok": True, **reply}, caller.gifts)
                wire.close_all(caller.gifts)

    def end(self) -> None:
        """As if the supervisor had ended."""
        self.answers.set()
        if self._listener.fileno() >= 0:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        (self.directory / registry.FILE).unlink(missing_ok=True)

    def close(self) -> None:
        self.end()
        for vm in self.vms.values():
            vm.kill()
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()


@contextlib.contextmanager
def fake_bed(name: str = "fake") -> Iterator[tuple[FakeBed, Endpoint, Endpoint]]:
    """A testbed with a link whose two ends are connected in this process; pump them to have traffic."""
    with short_directory() as directory, running() as service, contextlib.ExitStack() as held:
        region = service.create(RegionSpec("link", 1 << 20, {"front": Rights.RW, "back": Rights.RW}, CHANNELS))
        mapped = [held.enter_context(join(region.socket(member))) for member in ("front", "back")]
        ports = [SharedPort(one, "calls", release=lambda: None) for one in mapped]
        pair = endpoints(ports[0], ports[1])
        for end in pair:
            held.callback(end.abandon)
        base = directory / "idc-testbed"
        base.mkdir()
        bed = FakeBed(name, base, service, region)
        held.callback(bed.close)
        yield bed, *pair
