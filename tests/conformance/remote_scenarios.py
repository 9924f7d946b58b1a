"""Remote buffers over every transport: the back end registers, the front end uses; which route is taken is not asked.

Where the port maps a region the buffers are its pages, else process memory, and the same has to come of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING

from scenarios import LIMIT, WIDE, Recorder, Scenario, destroyed, drive, failure

from idc.buffers import LocalBuffer, PagePool, Strategy, process_memory, standard_registry
from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Result, State
from idc.endpoint.aio import AsyncCaller
from idc.endpoint.blocking import Caller
from idc.errors import HandlerFailedError, MisuseError, RefusedError
from idc.remote import Access, Borrowed, Exports, Refusal, Regions, Registration, Remote, RemoteBuffer, Route
from idc.transport.address import open_port
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.transport.base import Port

RW = Access.READ | Access.WRITE
#: Of a buffer; not whole pages.
LENGTH = 70_001
SKEW = 123


def pattern(seed: int, length: int = LENGTH) -> bytes:
    digest = hashlib.sha256(bytes([seed]))
    return b"".join(hashlib.sha256(digest.digest() + n.to_bytes(4, "little")).digest()
                    for n in range(length // 32 + 1))[:length]


class Site:
    """A domain with what it needs for remote buffers."""

    def __init__(self, port: Port | None = None) -> None:
        regions = port.regions if port is not None else ()
        self.exports = Exports(count=8, leases=8, forwards=4, regions=Regions(*regions))
        self.pool = PagePool.of(regions[0]) if regions else None
        self.registry = standard_registry()

    def remote(self) -> Remote:
        return Remote(self.exports, asks=4, serves=4, buffers=8, operations=4, ask_bytes=8192)

    def buffer(self, data: bytes, skew: int = SKEW) -> LocalBuffer:
        """Region pages if there are any, else memory."""
        if self.pool is None:
            return process_memory(bytearray(data))
        buffer = self.pool.allocate(len(data), skew)
        self.registry.copy(process_memory(data), buffer)
        return buffer

    def look(self, buffer: LocalBuffer) -> bytes:
        found = bytearray(buffer.length)
        self.registry.copy(buffer, process_memory(found))
        return bytes(found)

    def quiet(self) -> None:
        """Nothing may be left."""
        assert (self.exports.registered, self.exports.leases, self.exports.forwarded) == (0, 0, 0)


class Lender(Recorder):
    """Registers, and does what it is told: the word before a blank says what."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.lent: list[Registration] = []
        self.filled: list[tuple[int, int]] = []
        self.returned = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        word, _, rest = transaction.parameters.partition(b" ")
        getattr(self, f"do_{word.decode()}")(endpoint, transaction, rest)

    def _lend(self, endpoint: Endpoint, transaction: IncomingTransaction, buffer: LocalBuffer, access: Access = RW, *,
              outlives: bool = False) -> None:
        self.lent.append(endpoint.register(buffer, access, filled=lambda *what: self.filled.append(what),
                                           returned=self._back, outlives=outlives))
        transaction.complete(self.lent[-1].reference())

    def _back(self) -> None:
        self.returned += 1

    def do_pages(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        self._lend(endpoint, transaction, self.site.buffer(pattern(1)), RW | Access.TAKE)

    def do_memory(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        self._lend(endpoint, transaction, process_memory(bytearray(pattern(1))))

    def do_stays(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        self._lend(endpoint, transaction, self.site.buffer(pattern(1)), outlives=True)

    def do_part(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        transaction.complete(self.lent[-1].reference(1000, 500, Access.READ))

    def do_faulty(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        def raising(offset: int, length: int) -> None:
            raise ValueError("as asked")

        self.lent.append(endpoint.register(self.site.buffer(pattern(1)), RW, filled=raising))
        transaction.complete(self.lent[-1].reference())

    def do_digest(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        transaction.complete(hashlib.sha256(self.site.look(self.lent[-1].buffer)).digest())

    def do_told(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        transaction.complete(repr((self.filled, self.returned)).encode())

    def do_end(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        """Unregister the last one; complete when that has."""
        def done(completion: Completion) -> None:
            if completion.result is Result.OK:
                self.lent.pop()
                transaction.complete(b"quiet")
            else:
                transaction.complete(completion.reason.encode(), completion.error)

        self.lent[-1].unregister(done, float(rest or b"5"))

    def do_cut(self, endpoint: Endpoint, transaction: IncomingTransaction, rest: bytes) -> None:
        endpoint.disconnect("cut off")
        transaction.complete()


def lend(address: str, cycles: int = 1) -> None:
    """The back end of all of these."""
    port = open_port(address)
    site = Site(port)
    client = Lender(site)
    endpoint = Endpoint(port, client, WIDE.resources(site.remote()), "front")
    drive(endpoint, until=lambda: client.cycles == cycles)
    for registration in client.lent:
        if registration.live:
            registration.unregister()
    site.quiet()
    destroyed(endpoint)


def lend_twice(address: str) -> None:
    lend(address, cycles=2)


class Borrower:
    """The front end, with a blocking way to ask."""

    def __init__(self, address: str) -> None:
        port = open_port(address)
        self.site = Site(port)
        self.client = Recorder()
        self.endpoint = Endpoint(port, self.client, WIDE.resources(self.site.remote()), "back")
        self.connected()

    def connected(self) -> None:
        drive(self.endpoint, until=lambda: self.endpoint.state is State.CONNECTED)

    def completion(self, begin: Callable[[Callable[[Completion], None]], Result]) -> Completion:
        told: list[Completion] = []
        assert begin(told.append) is Result.OK
        drive(self.endpoint, until=lambda: bool(told))
        return told[0]

    def ask(self, what: bytes) -> Completion:
        return self.completion(lambda done: self.endpoint.submit_transaction(what, done))

    def remote(self, what: bytes) -> RemoteBuffer:
        """What the back end lends when asked for that."""
        answer = self.ask(what)
        assert answer.result is Result.OK, answer
        return self.endpoint.remote(answer.status)

    def received(self, remote: RemoteBuffer, into: LocalBuffer | None = None) -> bytes:
        target = process_memory(bytearray(len(remote))) if into is None else into
        completion = self.completion(lambda done: remote.receive_from(target, done))
        assert completion.result is Result.OK, completion
        return self.site.look(target)

    def digest(self) -> bytes:
        return self.ask(b"digest").status

    def end(self) -> None:
        destroyed(self.endpoint)
        self.site.quiet()


def bytes_front(address: str) -> None:
    """Read, written, told, many at a time; by whichever route, each byte as often as the route says."""
    here = Borrower(address)
    for kind in (b"pages", b"memory"):
        remote = here.remote(kind)
        if here.site.pool is None or kind == b"memory":
            into = process_memory(bytearray(len(remote)))
        else:
            into = here.site.pool.allocate_like(remote)
            assert into.offset_in_page == SKEW
        assert here.received(remote, into) == pattern(1)
        copies = {Route.DIRECT: 1, Route.OWNER: 2, Route.NETWORK: 2}
        assert remote.route is not None
        assert remote.counter.copied == copies[remote.route] * LENGTH, (remote.route, remote.counter)
        assert (remote.route is Route.DIRECT) == (kind == b"pages" and here.site.pool is not None)

        told: list[Completion] = []
        turned = process_memory(pattern(1)[::-1])
        quarter = LENGTH // 4
        pieces = [(0, quarter), (quarter, quarter), (2 * quarter, quarter), (3 * quarter, LENGTH - 3 * quarter)]
        for at, count in pieces:
            assert remote.send_to(turned.slice(at, count), told.append, offset=at, filled=True) is Result.OK
        assert remote.resolve() is Result.BACK_PRESSURED
        drive(here.endpoint, until=lambda told=told: len(told) == 4)  # type: ignore[misc]
        assert {completion.result for completion in told} == {Result.OK}
        assert here.digest() == hashlib.sha256(pattern(1)[::-1]).digest()
    seen = 2 * [(0, quarter), (quarter, quarter), (2 * quarter, quarter), (3 * quarter, LENGTH - 3 * quarter)]
    filled = here.ask(b"told").status.decode()
    assert all(filled.count(str(what)) == 2 for what in seen), filled
    part = here.remote(b"part")
    assert here.received(part) == pattern(1)[::-1][1000:1500]
    failure(MisuseError, lambda: part.send_to(process_memory(b"x")))
    here.end()


def strategies_front(address: str) -> None:
    """Shared and handed over where that is possible, copied where it is not: the client does the same."""
    here = Borrower(address)
    remote = here.remote(b"pages")
    near = here.site.pool is not None

    def borrow(how: str) -> Borrowed:
        got: list[Borrowed | None] = []
        assert getattr(remote, how)(lambda _, borrowed: got.append(borrowed)) is Result.OK
        drive(here.endpoint, until=lambda: bool(got))
        assert got[0] is not None
        assert here.site.look(got[0].buffer) == pattern(1)
        here.site.registry.copy(process_memory(b"private"), got[0].buffer.slice(5000, 7))
        return got[0]

    shared = borrow("share")
    assert shared.strategy is (Strategy.MAP if near else Strategy.COPY)
    assert here.digest() == hashlib.sha256(pattern(1)).digest()
    shared.release()
    moved = borrow("move")
    assert moved.strategy is (Strategy.HANDOVER if near else Strategy.COPY)
    moved.release()
    content = bytearray(pattern(1))
    if near:
        content[5000:5007] = b"private"  # the owner has its pages back, as they are
    drive(here.endpoint, until=lambda: here.ask(b"told").status == b"([], %d)" % near)
    assert here.digest() == hashlib.sha256(content).digest()
    here.end()


def revoke_front(address: str) -> None:
    """Unregistering completes when this side lets go, or fails naming it; what comes after is refused with a reason."""
    here = Borrower(address)
    remote = here.remote(b"pages")
    got: list[Borrowed | None] = []
    remote.share(lambda _, borrowed: got.append(borrowed))
    drive(here.endpoint, until=lambda: bool(got))
    shared = got[0]
    assert shared is not None
    if shared.strategy is Strategy.MAP:
        answer = here.ask(b"end 0.2")
        assert (answer.error, answer.status) == (Refusal.HELD, b"held by front, which did not let go in time")
        told: list[Completion] = []
        assert here.endpoint.submit_transaction(b"end", told.append) is Result.OK
        here.endpoint.pump(0.05)
        assert not told
        shared.release()
        drive(here.endpoint, until=lambda: bool(told))
        assert told[0].status == b"quiet"
    else:
        assert here.ask(b"end").status == b"quiet"
        shared.release()
    local = process_memory(bytearray(1))
    completion = here.completion(lambda done: remote.receive_from(local, done))
    assert completion.error in (Refusal.WITHDRAWN, Refusal.STALE)
    again = here.endpoint.remote(remote.data)
    completion = here.completion(lambda done: again.receive_from(local, done))
    assert (completion.error, completion.reason) == (Refusal.STALE, "the buffer was unregistered")
    forged = bytearray(here.remote(b"memory").data)
    forged[50] ^= 1
    other = here.endpoint.remote(bytes(forged))
    assert here.completion(lambda done: other.filled(0, 0, done)).error == Refusal.FORGED
    here.end()


def cut_front(address: str) -> None:
    """With the connection go registrations and transfers; what outlives it is reached by the next one."""
    here = Borrower(address)
    memory, stays = here.remote(b"memory"), here.remote(b"stays")
    assert here.received(stays) == pattern(1)
    told: list[Completion] = []
    for remote in (memory, stays, memory, stays):
        assert remote.receive_from(process_memory(bytearray(LENGTH)), told.append) is Result.OK
    assert here.ask(b"cut").result is Result.OUTCOME_UNKNOWN
    assert len(told) == 4  # completed before disconnect was told
    assert {completion.result for completion in told} <= {Result.OK, Result.OUTCOME_UNKNOWN}
    here.connected()
    assert memory.resolve() is Result.CLOSED
    again, stale = here.endpoint.remote(stays.data), here.endpoint.remote(memory.data)
    assert here.received(again) == pattern(1)
    assert here.completion(stale.resolve).error == Refusal.STALE
    here.end()


def forward_front(address: str) -> None:
    """This end holds the reference, and a third domain gets it from here: the bytes come, this client sees nothing."""
    here = Borrower(address)
    theirs, ours = meeting()
    third = Site()
    far = Endpoint(theirs, Client(), WIDE.resources(third.remote()), "middle")
    near = Endpoint(ours, Client(), WIDE.resources(here.site.remote()), "third")
    everyone = (here.endpoint, far, near)
    drive(*everyone, until=lambda: far.state is near.state is State.CONNECTED)
    held = here.remote(b"pages")
    remote = far.remote(held.forward())
    told: list[Completion] = []
    target = bytearray(LENGTH)
    assert remote.receive_from(process_memory(target), told.append) is Result.OK
    drive(*everyone, until=lambda: bool(told))
    assert (told[0].result, bytes(target)) == (Result.OK, pattern(1)), told
    assert (remote.route, remote.counter.copied) == (Route.NETWORK, 3 * LENGTH)
    turned = process_memory(pattern(1)[::-1])
    assert remote.send_to(turned, told.append, filled=True) is Result.OK
    drive(*everyone, until=lambda: len(told) == 2)
    assert told[1].result is Result.OK
    assert here.digest() == hashlib.sha256(pattern(1)[::-1]).digest()
    assert here.ask(b"told").status == b"([(0, %d)], 0)" % LENGTH
    held.close()
    assert remote.filled(0, 0, told.append) is Result.OK
    drive(*everyone, until=lambda: len(told) == 3)
    assert told[2].error == Refusal.NO_ROUTE
    destroyed(far, near)
    here.end()
    third.quiet()


def faces_front(address: str) -> None:
    """Blocking, then asyncio: each call returns when it is done, or raises what went wrong."""
    port = open_port(address)
    site = Site(port)
    with Caller(port, WIDE.resources(site.remote())) as caller:
        remote = caller.endpoint.remote(caller.transact(b"pages", timeout=LIMIT))
        target = process_memory(bytearray(LENGTH))
        caller.receive_from(remote, target, timeout=LIMIT)
        assert site.look(target) == pattern(1)
        caller.send_to(remote, process_memory(b"abc"), offset=7, filled=True, timeout=LIMIT)
        caller.filled(remote, 1, 2, timeout=LIMIT)
        assert caller.transact(b"told", timeout=LIMIT) == b"([(7, 3), (1, 2)], 0)"
        for how in (caller.share, caller.move):
            got = how(remote, timeout=LIMIT)
            assert site.look(got.buffer)[:10] == pattern(1)[:7] + b"abc"
            got.release()
        faulty = caller.endpoint.remote(caller.transact(b"faulty", timeout=LIMIT))
        failed = failure(RefusedError, lambda: caller.filled(faulty, timeout=LIMIT))
        assert (failed.code, str(failed)) == (Refusal.FAILED, "ValueError: as asked")
        own = caller.endpoint.register(site.buffer(pattern(2)), RW)
        caller.unregister(own)
        failure(MisuseError, lambda: caller.unregister(own))
        nowhere = caller.endpoint.remote(remote.data, route=Route.HOST)
        assert "host copy is forced" in str(failure(MisuseError,
                                                    lambda: caller.receive_from(nowhere, target, timeout=LIMIT)))
        failure(HandlerFailedError, lambda: caller.transact(b"nonsense", timeout=LIMIT))
    site.quiet()
    asyncio.run(_faces(address))


async def _faces(address: str) -> None:
    async with asyncio.timeout(LIMIT):
        port = open_port(address)
        site = Site(port)
        async with AsyncCaller(port, WIDE.resources(site.remote())) as caller:
            await caller.connected()
            remote = caller.endpoint.remote(await caller.transact(b"pages"))
            targets = [process_memory(bytearray(10_000)) for _ in range(9)]  # more than there are slots
            await asyncio.gather(*(caller.receive_from(remote, target, offset=1000 * n)
                                   for n, target in enumerate(targets)))
            for n, target in enumerate(targets):
                assert site.look(target) == pattern(1)[1000 * n:1000 * n + 10_000]
            await caller.send_to(remote, process_memory(b"abc"), filled=True)
            await caller.filled(remote, 1, 2)
            assert (await caller.transact(b"told")).endswith(b"(0, 3), (1, 2)], %d)" % (port.regions != ()))
            for how in (caller.share, caller.move):
                got = await how(remote)
                assert site.look(got.buffer)[:5] == b"abc" + pattern(1)[3:5]
                got.release()
            own = caller.endpoint.register(site.buffer(pattern(2)), RW)
            await caller.unregister(own)
        site.quiet()


class Patient(Lender):
    """Completes the other's "enough" once it has had enough itself: until then both are wanted."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.heard: list[IncomingMessage] = []

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.heard.append(message)


def mirror(address: str) -> None:
    """Both sides lend, and both pull and push at once, with all slots in use: neither waits for ever."""
    port = open_port(address)
    site = Site(port)
    client = Patient(site)
    endpoint = Endpoint(port, client, WIDE.resources(site.remote()), "the other")
    drive(endpoint, until=lambda: endpoint.state is State.CONNECTED)
    told: list[Completion] = []
    for kind in (b"memory", b"pages"):
        assert endpoint.submit_transaction(kind, told.append) is Result.OK
    drive(endpoint, until=lambda: len(told) == 2)
    remotes = [endpoint.remote(completion.status) for completion in told]
    done: list[Completion] = []
    begun, deadline = 0, time.monotonic() + LIMIT
    while len(done) < 24:
        assert time.monotonic() < deadline, (begun, len(done))
        remote, local = remotes[begun % 2], process_memory(bytearray(pattern(3, 9000)))
        operation = remote.send_to if begun % 3 else remote.receive_from
        if begun < 24 and operation(local, done.append, offset=begun) is Result.OK:
            begun += 1
            continue
        endpoint.pump(0.05)
    assert all(completion.result is Result.OK for completion in done), done
    assert endpoint.submit_message(b"enough") is Result.OK
    drive(endpoint, until=lambda: bool(client.heard))
    client.heard[0].complete()
    drive(endpoint, until=lambda: endpoint.outstanding == 0)  # the other one has come as far
    destroyed(endpoint)
    site.quiet()


REMOTE_SCENARIOS = {
    "bytes": Scenario(bytes_front, lend),
    "strategies": Scenario(strategies_front, lend),
    "revoke": Scenario(revoke_front, lend),
    "cut": Scenario(cut_front, lend_twice),
    "forward": Scenario(forward_front, lend),
    "faces": Scenario(faces_front, lend_twice),
    "both-lend": Scenario(mirror, mirror),
}
