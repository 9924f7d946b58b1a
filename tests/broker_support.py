"""Domains of a broker's tests, all in the test's own process, with exports that can be told to lie."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from region_support import DEADLINE, running

from host.broker import CHANNEL
from host.ivshmem.client import join
from host.region import RegionSpec
from idc.buffers.memory import copy_memory
from idc.buffers.pool import REGION_PAGES
from idc.endpoint import Completion, State
from idc.layout import Rights
from idc.remote.control import Control
from idc.remote.reference import Access, Reference, genuine, mint, parse
from idc.remote.resolution import Lease, Refusal, Refused
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from host.region import Region as Served
    from host.region import RegionService
    from idc.buffers.local import LocalBuffer
    from idc.region import Region
    from idc.remote.resolution import Resolution

BOTH = Access.READ | Access.WRITE
OWNER = Path(__file__).parent / "process" / "broker_owner.py"
MIB = 1 << 20


@dataclass
class Exports:
    """Answers RESOLVE for buffers of region pages; the least that a broker needs of an owner.

    Attributes:
        lie: what to answer instead of the truth.
        asked: RESOLVEs so far.
    """

    control: Control
    known: dict[int, tuple[bytes, Region, int]] = field(default_factory=dict)
    held: dict[int, int] = field(default_factory=dict)
    lie: Callable[[Lease], Resolution] | None = None
    asked: int = 0
    dropped: int = 0

    def reference(self, region: Region, buffer: LocalBuffer, access: Access = BOTH) -> bytes:
        """Register a buffer; a reference to all of it."""
        identity = self.control.identity
        assert identity is not None
        slot, secret = len(self.known), secrets.token_bytes(32)
        offset = REGION_PAGES.where(buffer)[1]
        self.known[slot] = secret, region, offset
        return mint(Reference(identity.domain, identity.incarnation, slot, 0, access, 0, buffer.length), secret)

    def resolve(self, data: bytes, want: Access, holder: Control) -> Resolution:
        """As `idc.remote.control.Owner`."""
        self.asked += 1
        reference = parse(data)
        if reference.slot not in self.known:
            return Refused(Refusal.STALE, "no such registration")
        secret, region, offset = self.known[reference.slot]
        if not genuine(data, secret):
            return Refused(Refusal.FORGED, "the code is wrong")
        lease = len(self.held) + 1
        self.held[lease] = reference.slot
        truth = Lease(lease, region.header.uuid, "", offset + reference.offset, reference.length, want)
        return truth if self.lie is None else self.lie(truth)

    def release(self, holder: Control, lease: int) -> None:
        """A lease was given back."""
        self.held[lease] = -1

    def drop_holder(self, holder: Control) -> None:
        """The broker is gone."""
        self.dropped += 1


@dataclass
class Party:
    """One domain: its control link, its exports, the regions it maps."""

    name: str
    control: Control
    exports: Exports
    regions: dict[str, Region]

    def allocate(self, region: str, content: bytes) -> tuple[LocalBuffer, bytes]:
        """A buffer of the domain's own part, filled, and a reference to it."""
        mapped = self.regions[region]
        buffer = mapped.pool.allocate(len(content))
        copy_memory(memoryview(content), 0, *REGION_PAGES.where(buffer), len(content))
        return buffer, self.exports.reference(mapped, buffer)

    def content(self, region: str, buffer: LocalBuffer) -> bytes:
        """What a buffer holds."""
        return bytes(self.regions[region].pool.view(buffer))


def drive(parties: list[Party], done: Callable[[], bool], limit: float = DEADLINE) -> None:
    """Drive the control links until something holds."""
    deadline = time.monotonic() + limit
    while not done():
        assert time.monotonic() < deadline, "not in time"
        busy = [party.control.endpoint.pump(0.0) for party in parties]
        if not any(busy):
            time.sleep(0.0005)


def copy(parties: list[Party], asker: Party, source: bytes, target: bytes, length: int, *, source_offset: int = 0,
         target_offset: int = 0, limit: float = DEADLINE) -> Completion:
    """A copy, from request to answer."""
    answers: list[Completion] = []
    drive(parties, lambda: asker.control.endpoint.state is State.CONNECTED)
    result = asker.control.copy(source, target, length, answers.append, source_offset=source_offset,
                                target_offset=target_offset)
    assert result.value == "ok"
    drive(parties, lambda: bool(answers), limit)
    return answers[0]


@dataclass
class Bench:
    """A service with a broker, domains, and regions between them."""

    service: RegionService
    parties: dict[str, Party]
    served: dict[str, Served]

    def party(self, *names: str) -> list[Party]:
        """These domains; all without a name."""
        return [self.parties[name] for name in names or self.parties]


def join_domain(service: RegionService, name: str, control: Served, regions: list[Served], held: ExitStack) -> Party:
    """A domain in this process."""
    mapped = {}
    for region in regions:
        if name in region.sockets:
            mapped[region.name] = held.enter_context(join(region.socket(name)))
    link = Control(open_port(f"member:{control.socket(name)}/{CHANNEL}"))
    held.callback(link.close)
    link.identify(DEADLINE)
    exports = Exports(link)
    link.serve(exports)
    return Party(name, link, exports, mapped)


@contextmanager
def bench(*options: str, size: int = 16 * MIB, links: tuple[tuple[str, str], ...] = (("front", "middle"),
                                                                                    ("middle", "back"))
          ) -> Iterator[Bench]:
    """Domains front, middle, back; each pair of `links` has a region of its own, shared out evenly."""
    with running() as service:
        service.start_broker(*options)
        names = sorted({name for pair in links for name in pair})
        regions = [service.create(RegionSpec("-".join(pair), size, dict.fromkeys(pair, Rights.RW))) for pair in links]
        controls = {name: service.control(name) for name in names}
        with ExitStack() as held:
            parties = {name: join_domain(service, name, controls[name], regions, held) for name in names}
            served = {region.name: region for region in [*regions, *controls.values()]}
            yield Bench(service, parties, served)


@contextmanager
def owner(here: Bench, name: str, region: str, length: int) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """A domain in a process of its own, and a reference to what it has registered."""
    control = here.service.control(name)
    here.served[control.name] = control
    with started(here, name, region, length) as found:
        yield found


@contextmanager
def started(here: Bench, name: str, region: str, length: int) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    """The same, whose control region is there already."""
    command = [sys.executable, str(OWNER), name, str(here.served[f"control-{name}"].socket(name)),
               str(here.served[region].socket(name)), str(length)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, bytes.fromhex(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
