"""Process domains with drivers: the region service, a registry, a controller, and `guest.drivers` for each domain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from region_support import DEADLINE, running, short_directory

from host import registry as registries
from host.devices import Controller, ServicePlugger
from idc.device.classes import CHANNEL
from idc.domain import Service
from idc.endpoint.blocking import Caller
from idc.errors import OutcomeUnknownError
from idc.registry import Registry
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from host.region import RegionService
    from idc.device.states import State

EXAMPLES = Path(__file__).parent.parent / "docs/examples"
CLASSES = {"echo": (EXAMPLES / "echo_device.py", "echo_device:Echo"),
           "fakeblock": (Path(__file__).parent / "devices/block_device.py", "block_device:FakeBlock"),
           "ledger": (Path(__file__).parent / "devices/ledger_device.py", "ledger_device:Ledger")}


def install(directory: Path) -> Path:
    """Device classes as a distribution that somebody installed there."""
    metadata = directory / "somebodys_devices-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-devices\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, (_, value) in CLASSES.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[idc_testbed.devices]", *lines, ""]))
    for source, _ in CLASSES.values():
        (directory / source.name).write_bytes(source.read_bytes())
        sys.modules.pop(source.stem, None)  # that of an earlier test, whose directory is gone
    return directory


@dataclass
class DomainProcess:
    """A domain whose drivers run in processes, or will."""

    name: str
    address: str
    sockets: Path
    classes: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    prefix: tuple[str, ...] = ()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "guest.drivers", "--registry", self.address,
                 "--sockets", str(self.sockets), "--path", str(self.classes)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it; by SIGTERM the drivers are unloaded."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.process.wait(DEADLINE) == (0 if number == signal.SIGTERM else -number)
        self.process = None

    @property
    def worker(self) -> int:
        """The process that has the drivers; waits for it."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        deadline = time.monotonic() + DEADLINE
        while not (found := children.read_text().split()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return int(found[0])

    def replace(self, how: str) -> None:
        """"kill": SIGKILL to the drivers, and their keeper starts others; "reload": in order, the keeper too."""
        before = self.worker
        assert self.process is not None
        if how == "kill":
            os.kill(before, signal.SIGKILL)
        else:
            self.process.send_signal(signal.SIGHUP)
        until(lambda: self.worker != before)


@dataclass
class Bench:
    """Everything."""

    service: RegionService
    registry: Registry
    controller: Controller
    directory: Path
    domains: dict[str, DomainProcess] = field(default_factory=dict)

    def add(self, *names: str, start: bool = True) -> list[DomainProcess]:
        """Domains with control regions."""
        made = []
        for name in names:
            control = self.service.control(name)
            domain = DomainProcess(name, f"member:{control.socket(name)}/{registries.CHANNEL}",
                                   self.directory / name, self.directory / "classes", self.directory / f"{name}.log")
            self.domains[name] = domain
            made.append(domain)
            if start:
                domain.start()
        return made

    def program(self, domain: str, device: str) -> Caller:
        """A program of that domain that uses a device."""
        kind = device.partition("-")[0]
        return Caller(open_port(f"unix:{self.domains[domain].sockets / device}"), Service(kind).resources())

    def states(self) -> list[tuple[State, State]]:
        return [seen.states for seen in self.controller.devices()]


def until(what: Callable[[], bool], limit: float = DEADLINE) -> None:
    deadline = time.monotonic() + limit
    while not what():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


@contextmanager
def bench(*names: str, start: bool = True) -> Iterator[Bench]:
    """Domains of these names."""
    with ExitStack() as held:
        service = held.enter_context(running())
        service.start_registry()
        registry = held.enter_context(Registry(open_port(f"unix:{service.registry_socket}")))
        directory = held.enter_context(short_directory())
        classes = install(directory / "classes")
        sys.path.insert(0, str(classes))
        held.callback(sys.path.remove, str(classes))
        here = Bench(service, registry, Controller(registry, ServicePlugger(service)), directory)
        try:
            here.add(*names, start=start)
            yield here
        except BaseException:
            for domain in here.domains.values():
                if domain.log.exists():
                    sys.stderr.write(f"--- {domain.name}\n{domain.log.read_text()[-4000:]}\n")
            raise
        finally:
            for domain in here.domains.values():
                if domain.process is not None:
                    domain.process.terminate()
            for domain in here.domains.values():
                if domain.process is not None:
                    domain.process.wait(DEADLINE)


@dataclass
class Stream:
    """Numbered transactions, one after the other; an answer is to the number that was sent last.

    Attributes:
        sent: numbers so far.
        answered: of them, how many were; the others' outcome is unknown.
    """

    caller: Caller
    sent: int = 0
    answered: list[int] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)

    def one(self, limit: float = DEADLINE) -> bool:
        """The next number. Whether it was answered."""
        self.sent += 1
        try:
            answer = self.caller.transact(b"%d" % self.sent, timeout=limit)
        except OutcomeUnknownError:
            self.unknown.append(self.sent)
            return False
        assert answer == b"%d noted" % self.sent
        self.answered.append(self.sent)
        return True

    def go_on(self, limit: float = DEADLINE) -> None:
        """Until a number is answered that was sent from now on."""
        deadline = time.monotonic() + limit
        while not self.one(limit):
            assert time.monotonic() < deadline

    def check(self, ledger: Path) -> None:
        """Each number was executed at most once, in order, and each that was answered was."""
        noted = [int(line) for line in ledger.read_text().split()]
        assert noted == sorted(set(noted))
        assert set(self.answered) <= set(noted) <= set(self.answered) | set(self.unknown)
        assert sorted(self.answered + self.unknown) == list(range(1, self.sent + 1))


__all__ = ["CHANNEL", "Bench", "DomainProcess", "Stream", "bench", "install", "until"]
