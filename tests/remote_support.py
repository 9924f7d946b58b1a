"""What the tests of remote buffers share: domains of one process, joined by endpoints, that map regions or do not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from idc.buffers import LocalBuffer, PagePool
from idc.endpoint import Client, Completion, Endpoint, Quotas, Resources, Result, State
from idc.remote import Exports, Regions, Remote
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from support import LocalRegion

    from idc.region import Region
    from idc.transport.base import Port

LIMIT = 20.0
SIZE = 1 << 22


class Site:
    """A domain: its table, the regions that it maps, and a pool in each of those."""

    def __init__(self, *regions: Region, count: int = 8, leases: int = 8, forwards: int = 4, **options: Any) -> None:
        self.regions = Regions(*regions)
        self.exports = Exports(count, leases, forwards, regions=self.regions, **options)
        self.mapped = regions
        self.pools = [pool_of(region) for region in regions if region.member is not None]

    @property
    def pool_region(self) -> Region:
        return self.mapped[0]

    @property
    def pool(self) -> PagePool:
        return self.pools[0]

    def endpoint(self, port: Port, client: Client | None = None, name: str = "the peer", **options: Any) -> Endpoint:
        quotas = Quotas(8, 8, 256, 256)
        remote = Remote(self.exports, **{"ask_bytes": 4096, "buffers": 8, "operations": 4} | options)
        return Endpoint(port, client or Client(), Resources(quotas, requests=8, messages=8, remote=remote), name)

    def fill(self, data: bytes, offset_in_page: int = 0) -> LocalBuffer:
        """Pages with these bytes."""
        buffer = self.pool.allocate(len(data), offset_in_page)
        self.pool.view(buffer)[:] = data
        return buffer


def pool_of(region: Region) -> PagePool:
    (part,) = [part for part in region.header.parts if part.owner == region.member]
    return PagePool(region.memory, part.offset, part.length)


class Pair:
    """An owner and a holder, connected; each side's endpoint options are those of Remote."""

    def __init__(self, owner: Site, holder: Site, *, owning: dict[str, Any] | None = None, **holding: Any) -> None:
        one, two = meeting()
        self.owner, self.holder = owner, holder
        self.back = owner.endpoint(one, name="the holder", **(owning or {}))
        self.front = holder.endpoint(two, name="the owner", **holding)
        self.connect()

    def connect(self) -> None:
        drive(self.front, self.back, until=lambda: all(
            e.state is State.CONNECTED for e in (self.front, self.back)))

    def until(self, condition: Callable[[], bool]) -> None:
        drive(self.front, self.back, until=condition)

    def ended(self, begin: Callable[[Callable[[Completion], None]], Result]) -> Completion:
        """How an operation ended that must begin."""
        return ended(begin, self.front, self.back)

    def close(self) -> None:
        """Destroy both; nothing may be left of it."""
        for endpoint in (self.front, self.back):
            endpoint.destroy()
        assert not left_over(self.front, self.back)


def left_over(*endpoints: Endpoint) -> list[str]:
    """What is still held by endpoints that are over."""
    found = []
    for endpoint in endpoints:
        link: Any = endpoint._party
        found += [f"{what} {value}" for what, value in (
            ("operations", link.operations), ("buffers", link._buffers), ("leases", link._leases),
            ("queue", link._queue), ("asks", link.resources.asks.outstanding), ("runnable", link.runnable),
            ("forwarded", link.forwarder._leases), ("given", link.exports._leases),
            ("forwards", link.exports._forwards)) if value]
    return found


def drive(*endpoints: Endpoint, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not until():
        assert time.monotonic() < deadline, [(e.state, e.reason) for e in endpoints]
        for endpoint in endpoints:
            endpoint.pump(0.0)


def ended(begin: Callable[[Callable[[Completion], None]], Result], *endpoints: Endpoint) -> Completion:
    told: list[Completion] = []
    assert begin(told.append) is Result.OK
    drive(*endpoints, until=lambda: bool(told))
    assert len(told) == 1
    return told[0]


def join(shared: LocalRegion, members: Iterable[int] = (0, 1)) -> list[Region]:
    return [shared.join(member) for member in members]
