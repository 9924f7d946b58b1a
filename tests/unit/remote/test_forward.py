"""Three domains: a reference that B got from A and gave to C works there; B's client never sees what goes by."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from remote_support import SIZE, Site, drive, ended, join, left_over
from support import LocalRegion

from idc.buffers import CopyCounter, LocalBuffer, Strategy, process_memory
from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Result, State
from idc.errors import BackPressuredError, MisuseError
from idc.layout import PAGE
from idc.remote import Access, Borrowed, Lease, Refusal, Registration, RemoteBuffer, Route, Worth
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RW = Access.READ | Access.WRITE
DATA = os.urandom(2 * PAGE + 5)


class Unseeing(Client):
    """A middle that must be told nothing."""

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        raise AssertionError("the middle's client was told")

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        raise AssertionError("the middle's client was told")


class Chain:
    """A - B - C, each a domain of its own."""

    def __init__(self, a: Site, b: Site, c: Site, **at_c: Any) -> None:
        self.a, self.b, self.c = a, b, c
        one, two = meeting()
        three, four = meeting()
        self.a_b = a.endpoint(one, name="B")
        self.b_a = b.endpoint(two, Unseeing(), name="A", ask_bytes=700)
        self.b_c = b.endpoint(three, Unseeing(), name="C")
        self.c_b = c.endpoint(four, name="B", **at_c)
        self.all = (self.a_b, self.b_a, self.b_c, self.c_b)
        self.until(lambda: all(e.state is State.CONNECTED for e in self.all))
        self.ways: list[RemoteBuffer] = []

    def until(self, condition: Callable[[], bool]) -> None:
        drive(*self.all, until=condition)

    def ended(self, begin: Callable[[Callable[[Completion], None]], Result]) -> Completion:
        return ended(begin, *self.all)

    def passed(self, registration: Registration, **options: Any) -> RemoteBuffer:
        """What C has of it, by B."""
        self.ways.append(self.b_a.remote(registration.reference()))
        return self.c_b.remote(self.ways[-1].forward(), **options)

    def received(self, remote: RemoteBuffer) -> bytes:
        target = bytearray(len(remote))
        completion = self.ended(lambda done: remote.receive_from(process_memory(target), done))
        assert completion.result is Result.OK, completion
        return bytes(target)

    def borrow(self, remote: RemoteBuffer, how: str) -> Borrowed:
        told: list[tuple[Completion, Borrowed | None]] = []
        assert getattr(remote, how)(lambda *what: told.append(what)) is Result.OK
        self.until(lambda: bool(told))
        assert told[0][1] is not None, told
        return told[0][1]

    def close(self) -> None:
        for endpoint in self.all:
            endpoint.destroy()
        assert not left_over(*self.all)


@pytest.fixture
def far() -> Iterator[LocalRegion]:
    region = LocalRegion(size=SIZE)
    yield region
    region.close()


@pytest.fixture
def chain(far: LocalRegion) -> Iterator[Chain]:
    """A and C share a region that B does not map."""
    a, c = join(far)
    chain = Chain(Site(a), Site(), Site(c))
    yield chain
    chain.close()


def test_where_a_and_c_share_the_region_c_copies_by_itself(chain: Chain) -> None:
    registration = chain.a_b.register(chain.a.fill(DATA, 9), RW)
    remote = chain.passed(registration)
    assert chain.received(remote) == DATA
    assert (remote.route, remote.refusal, remote.counter.copied) == (Route.DIRECT, Worth.SOFT, len(DATA))
    assert registration.holders == ["B"]
    assert chain.ended(lambda done: remote.send_to(process_memory(DATA[::-1]), done)).result is Result.OK
    assert bytes(chain.a.pool.view(registration.buffer)) == DATA[::-1]
    assert chain.a.exports.counter.copied == 0
    told: list[Completion] = []
    registration.unregister(told.append)
    assert not told
    chain.until(lambda: bool(told))
    assert told == [Completion(Result.OK)]
    assert chain.ended(remote.resolve).error == Refusal.WITHDRAWN
    assert (chain.a.exports.leases, chain.b.exports.leases) == (0, 0)


def test_quiescence_waits_for_the_holder_at_the_end(chain: Chain) -> None:
    registration = chain.a_b.register(chain.a.fill(DATA), RW)
    got = chain.borrow(chain.passed(registration), "share")
    assert got.strategy is Strategy.MAP
    told: list[Completion] = []
    registration.unregister(told.append, timeout=0.05)
    chain.until(lambda: bool(told))
    assert (told[0].error, told[0].reason[:9]) == (Refusal.HELD, "held by B")
    registration.unregister(told.append)
    got.release()
    chain.until(lambda: len(told) == 2)
    assert told[1].result is Result.OK


def test_pages_are_handed_over_past_the_middle(chain: Chain) -> None:
    back: list[int] = []
    registration = chain.a_b.register(chain.a.fill(DATA), RW | Access.TAKE, returned=lambda: back.append(1))
    got = chain.borrow(chain.passed(registration), "move")
    assert got.strategy is Strategy.HANDOVER
    assert registration.handed
    got.release()
    chain.until(lambda: bool(back))
    assert not registration.handed


def test_where_nothing_is_shared_the_bytes_go_through_the_middle() -> None:
    chain = Chain(Site(), Site(), Site())
    memory, told = bytearray(DATA), list[tuple[int, int]]()
    registration = chain.a_b.register(process_memory(memory), RW, filled=lambda *what: told.append(what))
    remote = chain.passed(registration)
    assert chain.received(remote) == DATA
    assert (remote.route, remote.refusal) == (Route.NETWORK, Worth.HARD)
    assert remote.counter.copied == 3 * len(DATA)  # at the owner, in the middle, here
    turned = process_memory(DATA[::-1])
    assert chain.ended(lambda done: remote.send_to(turned, done, filled=True)).result is Result.OK
    assert (bytes(memory), told) == (DATA[::-1], [(0, len(DATA))])
    assert chain.b.exports.counter == CopyCounter()
    forced = chain.c_b.remote(remote.data, route=Route.OWNER)
    completion = chain.ended(lambda done: forced.receive_from(process_memory(bytearray(1)), done))
    assert completion.reason == "owner copy is forced, but the owner is 1 domains further on"
    registration.unregister()
    assert chain.ended(lambda done: remote.filled(done=done)).error == Refusal.STALE
    chain.close()


def test_the_middle_uses_the_buffer_itself_as_well() -> None:
    chain = Chain(Site(), Site(), Site())
    registration = chain.a_b.register(process_memory(bytearray(DATA)), RW)
    remote = chain.passed(registration)
    for one in (remote, chain.ways[0]):
        assert chain.received(one) == DATA
    assert chain.ways[0].route is Route.OWNER
    chain.close()


def test_what_the_middle_does_not_forward_does_not_pass() -> None:
    chain = Chain(Site(), Site(), Site())
    registration = chain.a_b.register(process_memory(bytearray(DATA)), RW)
    remote = chain.c_b.remote(registration.reference())  # C got it by some other way
    assert chain.ended(remote.resolve).error == Refusal.NO_ROUTE
    passed = chain.passed(registration)
    assert chain.received(passed) == DATA
    other = chain.c_b.remote(registration.reference(1))  # of the same buffer, but not what was forwarded
    assert chain.ended(other.resolve).error == Refusal.NO_ROUTE
    chain.ways[0].close()
    completion = chain.ended(lambda done: passed.receive_from(process_memory(bytearray(1)), done))
    assert completion.error == Refusal.NO_ROUTE
    with pytest.raises(MisuseError, match="closed"):
        chain.ways[0].forward()
    chain.close()


def test_forwards_are_bounded() -> None:
    chain = Chain(Site(), Site(forwards=1), Site())
    registration = chain.a_b.register(process_memory(bytearray(DATA)), RW)
    first = chain.b_a.remote(registration.reference())
    second = chain.b_a.remote(registration.reference(1))
    assert first.forward() == first.forward() == registration.reference()
    with pytest.raises(BackPressuredError, match="1 references are forwarded"):
        second.forward()
    first.close()
    second.forward()
    chain.close()


def test_a_middle_without_a_lease_left_forwards_the_bytes(far: LocalRegion) -> None:
    a, c = join(far)
    chain = Chain(Site(a), Site(leases=0), Site(c))
    registration = chain.a_b.register(chain.a.fill(DATA), RW)
    remote = chain.passed(registration)
    assert chain.received(remote) == DATA
    assert (remote.route, remote.refusal) == (Route.NETWORK, Worth.SOFT)
    assert registration.holders == []
    chain.close()


@pytest.mark.parametrize("end", ["a_b", "b_a", "b_c", "c_b"])
def test_a_connection_that_is_lost_on_the_way_leaves_nothing(chain: Chain, end: str) -> None:
    registration = chain.a_b.register(chain.a.fill(DATA), RW, outlives=True)
    private = chain.a_b.register(process_memory(bytearray(1 << 20)), RW, outlives=True)
    leased, slow = chain.passed(registration), chain.passed(private)
    got = chain.borrow(leased, "share")
    told: list[Completion] = []
    slow.receive_from(process_memory(bytearray(1 << 20)), told.append)
    for endpoint in chain.all * 3:
        endpoint.pump()
    connections = {endpoint: endpoint.connections for endpoint in chain.all}
    lost: Endpoint = getattr(chain, end)
    lost.disconnect()
    chain.until(lambda: bool(told) and lost.connections > connections[lost] and lost.state is State.CONNECTED)
    assert told[0].result in (Result.OUTCOME_UNKNOWN, Result.ERROR)
    if end in ("a_b", "b_a"):
        assert told[0].error in (Refusal.STALE, Refusal.NO_ROUTE)
        assert chain.b.exports.forwarded == 0
        assert leased.withdrawn  # C is told, though A is out of its sight
    got.release()
    chain.until(lambda: chain.a.exports.leases == chain.b.exports.leases == 0)
    for one in (registration, private):
        one.unregister(told.append)
    assert [completion.result for completion in told[1:]] == [Result.OK, Result.OK]


class FakeBroker:
    """Maps every region; copies when told to `turn`, and keeps its leases until they are revoked."""

    def __init__(self, *sites: Site) -> None:
        self.sites = {site.exports.domain: site for site in sites}
        self.name = "broker"
        self.todo: list[Callable[[], None]] = []
        self.copied = 0
        self.answer: Result = Result.OK
        self.refuse: Refusal | None = None

    def copy(self, source: bytes, target: bytes, length: int, done: Callable[[Completion], None], *,
             source_offset: int = 0, target_offset: int = 0) -> Result:
        if self.answer is not Result.OK:
            return self.answer
        self.todo.append(lambda: done(self._copy((source, source_offset, Access.READ),
                                                 (target, target_offset, Access.WRITE), length)))
        return Result.OK

    def _copy(self, source: tuple[bytes, int, Access], target: tuple[bytes, int, Access], length: int) -> Completion:
        if self.refuse is not None:
            return Completion(Result.ERROR, self.refuse, reason="the broker says no")
        places = []
        for data, offset, want in (source, target):
            for site in self.sites.values():
                lease = site.exports.resolve(data, want, self)
                if isinstance(lease, Lease):
                    region = site.regions.get(lease.region)
                    assert region is not None
                    places.append(memoryview(region.memory)[lease.offset + offset:lease.offset + offset + length])
        assert len(places) == 2
        places[1][:] = places[0]
        for place in places:
            place.release()
        self.copied += length
        return Completion(Result.OK)

    def revoke(self, lease: int) -> None:
        for site in self.sites.values():
            held = site.exports.held(lease)
            if held is not None and held.holder is self:
                site.exports.release(self, lease)

    def turn(self) -> None:
        todo, self.todo = self.todo, []
        for one in todo:
            one()


class Apart:
    """A owns pages of one region, C's are in another; both by a link of two, and a broker."""

    def __init__(self, **at_c: Any) -> None:
        self.regions = LocalRegion(size=SIZE), LocalRegion(size=SIZE)
        self.a, self.c = (Site(join(region, [0])[0]) for region in self.regions)
        self.broker = FakeBroker(self.a, self.c)
        one, two = meeting()
        self.back = self.a.endpoint(one, name="C")
        self.front = self.c.endpoint(two, name="A", broker=self.broker, **at_c)
        self.until(lambda: self.front.state is self.back.state is State.CONNECTED)
        self.registration = self.back.register(self.a.fill(DATA, 3), RW)

    def until(self, condition: Callable[[], bool]) -> None:
        def turned() -> bool:
            self.broker.turn()
            return condition()

        drive(self.front, self.back, until=turned)

    def ended(self, begin: Callable[[Callable[[Completion], None]], Result]) -> Completion:
        told: list[Completion] = []
        assert begin(told.append) is Result.OK
        self.until(lambda: bool(told))
        return told[0]

    def close(self) -> None:
        for endpoint in (self.front, self.back):
            endpoint.destroy()
        self.broker.turn()
        assert not left_over(self.front, self.back)
        assert self.c.exports.registered == 0
        for region in self.regions:
            region.close()


@pytest.fixture
def apart() -> Iterator[Apart]:
    apart = Apart()
    yield apart
    apart.close()


def test_a_broker_copies_once_between_regions_that_nobody_shares(apart: Apart) -> None:
    remote = apart.front.remote(apart.registration.reference())
    page = apart.c.pool.allocate_like(remote)
    assert apart.ended(lambda done: remote.receive_from(page.slice(0, 100), done, offset=50)).result is Result.OK
    assert bytes(apart.c.pool.view(page)[:100]) == DATA[50:150]
    assert (remote.route, remote.refusal, remote.counter.copied) == (Route.HOST, Worth.HARD, 100)
    apart.c.pool.view(page)[:] = DATA[::-1]
    assert apart.ended(lambda done: remote.send_to(page, done)).result is Result.OK
    assert bytes(apart.a.pool.view(apart.registration.buffer)) == DATA[::-1]
    assert apart.broker.copied == 100 + len(DATA)
    assert (apart.a.exports.counter.copied, apart.c.exports.registered) == (0, 0)
    assert apart.registration.holders == ["broker"]  # keeps its lease; the holder gave its own back
    told: list[Completion] = []
    apart.registration.unregister(told.append)
    assert told == [Completion(Result.OK)]


def test_a_forwarded_reference_works_by_the_broker_and_the_bytes_pass_no_middle(far: LocalRegion) -> None:
    near = LocalRegion(size=SIZE)
    a, c = Site(join(far, [0])[0]), Site(join(near, [0])[0])
    broker = FakeBroker(a, c)
    chain = Chain(a, Site(), c, broker=broker)
    registration = chain.a_b.register(a.fill(DATA, 5), RW)
    remote = chain.passed(registration)
    page, told = c.pool.allocate_like(remote), list[Completion]()
    assert remote.receive_from(page, told.append) is Result.OK

    def turned() -> bool:
        broker.turn()
        return bool(told)

    chain.until(turned)
    assert (told[0].result, bytes(c.pool.view(page))) == (Result.OK, DATA)
    assert (remote.route, remote.counter.copied, broker.copied) == (Route.HOST, len(DATA), len(DATA))
    assert [site.exports.counter.copied for site in (a, chain.b, c)] == [0, 0, 0]
    chain.until(lambda: registration.holders == ["broker"])  # what C got by B is given back
    registration.unregister()
    chain.close()
    near.close()


def test_what_a_broker_cannot_reach_goes_by_owner_copy(apart: Apart) -> None:
    remote = apart.front.remote(apart.registration.reference())
    assert received(apart, remote, process_memory(bytearray(len(DATA)))) is Route.OWNER  # not pages, here
    apart.broker.refuse = Refusal.NO_ROUTE
    assert received(apart, remote, apart.c.pool.allocate_like(remote)) is Route.OWNER
    private = apart.front.remote(apart.back.register(process_memory(bytearray(DATA)), RW).reference())
    assert received(apart, private, apart.c.pool.allocate_like(private)) is Route.OWNER
    assert apart.broker.copied == 0


def received(apart: Apart, remote: RemoteBuffer, target: LocalBuffer) -> Route | None:
    assert apart.ended(lambda done: remote.receive_from(target, done)).result is Result.OK
    found = bytearray(len(target))
    apart.c.exports.registry.copy(target, process_memory(found))
    assert found == DATA
    return remote.route


@pytest.mark.parametrize("refusal", [Refusal.NO_ROUTE, Refusal.RIGHTS])
def test_what_a_broker_refuses_when_it_is_forced_is_an_error(apart: Apart, refusal: Refusal) -> None:
    remote = apart.front.remote(apart.registration.reference(), route=Route.HOST)
    apart.broker.refuse = refusal
    page = apart.c.pool.allocate_like(remote)
    completion = apart.ended(lambda done: remote.receive_from(page, done))
    assert (completion.error, completion.reason) == (refusal, "the broker says no")
    completion = apart.ended(lambda done: remote.receive_from(process_memory(bytearray(1)), done))
    assert completion.reason == ("host copy is forced, but the local buffer is no pages of a region that is known here")


def test_a_broker_that_is_back_pressured_is_told_on(apart: Apart) -> None:
    remote = apart.front.remote(apart.registration.reference())
    page = apart.c.pool.allocate_like(remote)
    apart.broker.answer = Result.BACK_PRESSURED
    assert apart.ended(lambda done: remote.receive_from(page, done)).result is Result.BACK_PRESSURED
    others = [apart.c.exports.register(page, RW) for _ in range(8)]
    assert apart.ended(lambda done: remote.receive_from(page, done)).result is Result.BACK_PRESSURED
    for one in others:
        one.unregister()


@pytest.mark.parametrize("refusal", [None, Refusal.STALE, Refusal.NO_ROUTE])
def test_a_host_copy_under_way_completes_after_the_connection_is_lost(apart: Apart, refusal: Refusal | None) -> None:
    """The broker may be writing to the local buffer: to say that it is over before it is would be a lie.

    Nothing of it goes over the connection that follows: no other route, and the owner is not told.
    """
    filled: list[tuple[int, int]] = []
    registration = apart.back.register(apart.a.fill(DATA), RW, filled=lambda *what: filled.append(what), outlives=True)
    remote = apart.front.remote(registration.reference())
    page = apart.c.pool.allocate_like(remote)
    told: list[Completion] = []
    remote.send_to(page, told.append, filled=True)
    drive(apart.front, apart.back, until=lambda: bool(apart.broker.todo))
    connections = apart.front.connections
    apart.front.disconnect()
    drive(apart.front, apart.back, until=lambda: apart.front.connections > connections
          and apart.front.state is apart.back.state is State.CONNECTED)
    assert not told
    apart.broker.refuse = refusal
    apart.until(lambda: bool(told))
    if refusal is None:
        assert told[0].result is Result.OUTCOME_UNKNOWN
    else:
        assert told[0].error == refusal
    assert not filled
    assert apart.a.exports.counter.copied == 0
    registration.unregister()
