"""Remote buffers by host copy, from each face: real exports, real control links, one copy of each byte."""

from __future__ import annotations

import asyncio
import secrets
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from region_support import DEADLINE, running

from host.broker import CHANNEL
from host.region import RegionSpec
from idc.domain import Domain, Service
from idc.endpoint import Client, Endpoint, IncomingTransaction, Quotas
from idc.endpoint.aio import AsyncCaller
from idc.layout import ChannelSpec, Kind, Rights
from idc.remote import Access, Remote, Route
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.region import RegionService

STORE = Service("store", Quotas(8, 8, 128, 128), 8)
OTHER = Service("other")
BYTES = (1 << 20) + 5


class Owner(Client):
    """Registers what it owns when asked, and answers with the reference."""

    def __init__(self, domain: Domain, content: bytes) -> None:
        domain.share()
        self.endpoint = domain.endpoint(STORE, self, domain.resources(STORE))
        domain.endpoint(OTHER, Client())
        self.domain = domain
        pool = domain.region(OTHER).pool  # a region that the other side has no part in
        self.buffer = pool.allocate(len(content))
        with pool.view(self.buffer) as view:
            view[:] = content

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        if transaction.parameters == b"end":
            transaction.complete()
            self.domain.stop()
        else:
            transaction.complete(endpoint.register(self.buffer, Access.READ | Access.WRITE).reference())


@contextmanager
def two() -> Iterator[tuple[RegionService, Domain, bytes, str]]:
    """An owner that runs in a thread of its own; the user's domain; what the owner has; the user's address."""
    content = secrets.token_bytes(BYTES)
    with running() as service:
        service.start_broker()
        pair = {"user": Rights.RW, "owner": Rights.RW}
        link = service.create(RegionSpec("link", 4 << 20, pair, [
            ChannelSpec("store", Kind.MESSAGE, "user", "owner", 128 * 512, 512)], parts={"user": 2 << 20}))
        apart = service.create(RegionSpec("apart", 4 << 20, {"owner": Rights.RW, "third": Rights.RW}, [
            ChannelSpec("other", Kind.MESSAGE, "owner", "third", 128 * 512, 512)], parts={"owner": 2 << 20}))
        controls = {name: f"member:{service.control(name).socket(name)}/{CHANNEL}" for name in pair}
        address = f"member:{link.socket('user')}/store"
        failed: list[BaseException] = []

        def owner() -> None:
            domain = Domain({"store": f"member:{link.socket('owner')}/store",
                             "other": f"member:{apart.socket('owner')}/other"}, controls["owner"])
            try:
                Owner(domain, content)
                domain.run()
            except BaseException as error:
                failed.append(error)
                raise
            finally:
                domain.close()

        thread = threading.Thread(target=owner)
        thread.start()
        domain = Domain({"store": address}, controls["user"])
        try:
            yield service, domain, content, address
        finally:
            thread.join(DEADLINE)
            domain.close()
        assert not failed


def test_blocking() -> None:
    with two() as (service, domain, content, _):
        exports = domain.share()
        with domain.connect(STORE) as caller:
            pool = domain.region(STORE).pool
            into = pool.allocate(BYTES)
            remote = caller.endpoint.remote(caller.transact(b"where", timeout=DEADLINE), route=Route.HOST)
            caller.receive_from(remote, into, timeout=DEADLINE)
            assert bytes(pool.view(into)) == content
            with pool.view(into) as view:
                view[:100] = bytes(100)
            caller.send_to(remote, into.slice(0, 200), offset=1000, timeout=DEADLINE)
            caller.receive_from(remote, into, timeout=DEADLINE)
            assert bytes(pool.view(into)) == content[:1000] + bytes(100) + content[100:200] + content[1200:]
            assert remote.counter.copied == 2 * BYTES + 200
            assert exports.counter.copied == 0
            assert service.broker_status()["counts"]["user"]["copied"] == 2 * BYTES + 200
            caller.transact(b"end", timeout=DEADLINE)


def test_asyncio() -> None:
    with two() as (service, domain, content, address):
        exports = domain.share()
        control = domain.control
        assert control is not None

        async def use() -> None:
            port = open_port(address)
            region = port.region  # type: ignore[attr-defined]
            domain.regions.add(region)
            resources = STORE.resources(Remote(exports, broker=control))
            async with AsyncCaller(port, resources, beside=[control.endpoint]) as caller, asyncio.timeout(DEADLINE):
                into = region.pool.allocate(BYTES)
                remote = caller.endpoint.remote(await caller.transact(b"where"), route=Route.HOST)
                half = BYTES // 2
                await asyncio.gather(caller.receive_from(remote, into.slice(0, half)),
                                     caller.receive_from(remote, into.slice(half, BYTES - half), offset=half))
                assert bytes(region.pool.view(into)) == content
                remote.close()
                await caller.transact(b"end")

        asyncio.run(use())
        assert service.broker_status()["counts"]["user"]["copied"] == BYTES
