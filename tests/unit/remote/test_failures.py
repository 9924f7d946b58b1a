"""What fails at one side or between: memory that is closed or read-only, callbacks that raise, a middle's upstream that
breaks the rules, a broker that does not let go. Each ends as an error with a reason, and nothing is left."""

from __future__ import annotations

import mmap
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from remote_support import SIZE, Pair, Site, drive, ended, join, left_over
from support import LocalRegion

from idc.buffers import PagePool, Strategy, process_memory
from idc.endpoint import Completion, Endpoint, Quotas, Result, State
from idc.endpoint.frames import Kind, encode, hello, parse
from idc.errors import MisuseError
from idc.layout import PAGE, ChannelSpec
from idc.layout import Kind as RingKind
from idc.remote import Access, Borrowed, Exports, Lease, Refusal, Registration, Remote, Route, Worth, wire
from idc.transport.local import LocalCarrier, meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RW = Access.READ | Access.WRITE
ALL = RW | Access.TAKE


@pytest.fixture
def shared() -> Iterator[LocalRegion]:
    region = LocalRegion(size=SIZE)
    yield region
    region.close()


@pytest.fixture
def pair(shared: LocalRegion) -> Iterator[Pair]:
    one, other = join(shared)
    pair = Pair(Site(one), Site(other))
    yield pair
    pair.close()


def pages(pair: Pair, **options: Any) -> Registration:
    return pair.back.register(pair.owner.fill(bytes(PAGE)), ALL, **options)


@pytest.mark.parametrize("route", [Route.DIRECT, Route.OWNER])
def test_local_memory_that_cannot_be_used_fails_the_transfer_and_no_more(pair: Pair, route: Route) -> None:
    remote = pair.front.remote(pages(pair).reference(), route=route)
    closed = mmap.mmap(-1, PAGE)
    gone = process_memory(closed)
    closed.close()
    for begin in (partial(remote.receive_from, process_memory(b"read-only")), partial(remote.receive_from, gone),
                  partial(remote.send_to, gone)):
        completion = pair.ended(begin)
        assert (completion.result, completion.error) == (Result.ERROR, Refusal.FAILED)
        assert "here" in completion.reason
    assert pair.ended(partial(remote.receive_from, process_memory(bytearray(PAGE)))).result is Result.OK


def test_registered_memory_that_cannot_be_used_fails_at_its_owner(pair: Pair) -> None:
    fixed = pair.front.remote(pair.back.register(process_memory(b"read-only"), RW).reference())
    completion = pair.ended(partial(fixed.send_to, process_memory(b"x")))
    assert completion.error == Refusal.FAILED
    assert completion.reason.startswith("the owner could not write it: the memory to copy to is read-only")
    shrinks = bytearray(100)
    remote = pair.front.remote(pair.back.register(process_memory(shrinks), RW).reference())
    del shrinks[50:]
    assert pair.ended(partial(remote.receive_from, process_memory(bytearray(100)))).error == Refusal.FAILED
    assert pair.ended(partial(remote.receive_from, process_memory(bytearray(40)))).result is Result.OK


def test_an_owner_whose_region_is_closed_refuses(pair: Pair) -> None:
    remote = pair.front.remote(pages(pair).reference())
    pair.owner.pool_region.close()
    completion = pair.ended(remote.resolve)
    assert (completion.error, "the owner cannot reach it" in completion.reason) == (Refusal.FAILED, True)


def test_a_holder_whose_region_is_closed_or_forgotten_takes_another_route(pair: Pair) -> None:
    registration = pages(pair)
    region = pair.holder.pool_region
    region.close()
    target = process_memory(bytearray(PAGE))
    remote = pair.front.remote(registration.reference())
    assert pair.ended(partial(remote.receive_from, target)).result is Result.OK
    assert remote.route is Route.OWNER
    pair.holder.regions.discard(region)
    pair.holder.regions.discard(region)
    again = pair.front.remote(registration.reference())
    assert pair.ended(partial(again.receive_from, target)).result is Result.OK
    assert (again.route, again.refusal) == (Route.OWNER, Worth.HARD)
    assert registration.holders == []


def test_pages_of_a_region_that_the_owner_did_not_name_are_copied(pair: Pair) -> None:
    with mmap.mmap(-1, SIZE) as other:
        pool = PagePool(other, 0, SIZE)
        buffer = pool.allocate(PAGE)
        remote = pair.front.remote(pair.back.register(buffer, RW).reference())
        assert pair.ended(remote.resolve).result is Result.OK
        assert remote.route is Route.OWNER
        pool.release(buffer)


def raising(*_: object) -> None:
    raise RuntimeError("as asked")


def test_callbacks_that_raise_are_logged_and_hold_nothing_up(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    registration = pages(pair, returned=raising)
    remote = pair.front.remote(registration.reference(), revoked=raising)
    for how in ("move", "share"):
        got = borrow(pair, getattr(remote, how))
        got.release()
        pair.until(lambda: not registration.handed)
    assert "pages come back failed" in caplog.text
    told: list[Completion] = []
    registration.unregister(told.append)
    pair.until(lambda: bool(told))
    assert told == [Completion(Result.OK)]
    assert "is revoked failed" in caplog.text


def borrow(pair: Pair, begin: Callable[..., Result]) -> Borrowed:
    told: list[tuple[Completion, Borrowed | None]] = []
    assert begin(lambda *what: told.append(what)) is Result.OK
    pair.until(lambda: bool(told))
    assert told[0][1] is not None, told
    return told[0][1]


def test_owners_that_raise_as_the_connection_is_lost_keep_nobody_elses_leases(pair: Pair) -> None:
    told: list[Completion] = []
    registrations = [pages(pair, outlives=True) for _ in range(3)]
    for registration in registrations:
        borrow(pair, pair.front.remote(registration.reference()).share)
    for registration in registrations:
        registration.unregister(raising if registration is registrations[0] else told.append, timeout=0.0)
    with pytest.raises(RuntimeError, match="as asked"):
        pair.back.pump()
    assert [completion.error for completion in told] == [Refusal.HELD] * 2
    for registration in registrations:
        registration.unregister(raising if registration is registrations[0] else told.append, timeout=None)
    with pytest.raises(RuntimeError, match="as asked"):
        pair.back.disconnect()
    assert [completion.result for completion in told[2:]] == [Result.OK] * 2
    assert not left_over(pair.back)
    assert pair.owner.exports.registered == 0


def test_a_registration_that_ended_with_its_connection_can_be_waited_for_while_another_holds_it(pair: Pair) -> None:
    registration = pages(pair)
    broker = Keeping(pair.owner)
    answer = pair.owner.exports.resolve(registration.reference(), Access.READ, broker)
    assert isinstance(answer, Lease)
    broker.leases.append(answer.lease)
    pair.back.disconnect()
    assert not registration.live
    told: list[Completion] = []
    registration.unregister(told.append)
    assert not told
    pair.owner.exports.release(broker, answer.lease)
    assert told == [Completion(Result.OK)]
    with pytest.raises(MisuseError, match="unregistered before"):
        registration.unregister()


def test_a_time_out_that_nobody_waits_for(pair: Pair) -> None:
    registration = pages(pair)
    got = borrow(pair, pair.front.remote(registration.reference()).share)
    registration.unregister(timeout=0.0)
    pair.back.pump()
    registration.unregister()  # it failed, so it may be called again
    got.release()
    pair.until(lambda: pair.owner.exports.registered == 0)


def test_ones_own_buffer_goes_no_way_round(pair: Pair) -> None:
    reference = pages(pair).reference()
    for route in (Route.HOST, Route.OWNER, Route.NETWORK):
        remote = pair.back.remote(reference, route=route)
        completion = pair.ended(partial(remote.receive_from, process_memory(bytearray(1))))
        assert completion.reason == f"{route.value} is forced, but the buffer is this domain's own"
        remote.close()
    remote = pair.back.remote(reference)
    assert remote.refusal is Worth.SOFT
    assert remote.forward() == reference
    assert pair.owner.exports.forwarded == 0
    assert borrow(pair, remote.move).strategy is Strategy.COPY
    remote.close()


@pytest.mark.parametrize(("access", "route"), [(RW, None), (ALL, Route.OWNER)])
def test_pages_that_cannot_be_taken_are_copied(pair: Pair, access: Access, route: Route | None) -> None:
    registration = pages(pair)
    remote = pair.front.remote(registration.reference(access=access), route=route)
    assert borrow(pair, remote.move).strategy is Strategy.COPY
    assert not registration.handed


def test_a_reference_that_allows_to_take_only_cannot_be_resolved(pair: Pair) -> None:
    remote = pair.front.remote(pages(pair).reference(access=Access.TAKE))
    assert pair.ended(remote.resolve).error == Refusal.RIGHTS
    with pytest.raises(MisuseError, match="allows to take, not to read"):
        remote.move(raising)


@pytest.mark.parametrize("arguments", [{"asks": 0}, {"operations": -1}, {"buffers": 1 << 16}, {"ask_bytes": 255},
                                       {"ask_bytes": 1 << 25}])
def test_resources_out_of_range_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(MisuseError, match="must be"):
        Remote(**arguments)  # type: ignore[arg-type]


def test_a_table_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(MisuseError, match="must be 0 or more"):
        Exports(-1)


def test_a_member_without_a_part_has_no_pool() -> None:
    channel = ChannelSpec("all", RingKind.BYTE, "front", "back", 1 << 17)
    region = LocalRegion([channel], size=1 << 19)
    one, other = join(region)
    assert PagePool.of(one).offset != PagePool.of(other).offset
    other.member = None
    with pytest.raises(MisuseError, match="no part of region 'local'"):
        PagePool.of(other)
    region.close()


class Upstream:
    """B with an honest C, and an A that the test plays, frame by frame."""

    def __init__(self) -> None:
        self.b, self.c = Site(), Site()
        ports, others = meeting(), meeting()
        self.b_a = self.b.endpoint(ports[0], name="A")
        self.b_c = self.b.endpoint(others[0], name="C")
        self.c_b = self.c.endpoint(others[1], name="B")
        carrier: LocalCarrier | None = None
        while carrier is None:
            ports[1].look()
            self.b_a.pump()
            carrier = ports[1].connection()
        self.carrier = carrier
        carrier.post(hello(Quotas(8, 8, 256, 256, 8, 1024)))
        drive(*self.all, until=lambda: all(e.state is State.CONNECTED for e in self.all))
        carrier.take(0)
        self.reference = Site().exports.register(process_memory(bytearray(PAGE)), RW).reference()
        self.way = self.b_a.remote(self.reference)
        self.way.forward()
        self.told: list[Completion] = []

    @property
    def all(self) -> tuple[Endpoint, ...]:
        return self.b_a, self.b_c, self.c_b

    def turn(self) -> list[tuple[int, int, int, bytes]]:
        """What has come to A."""
        for endpoint in self.all * 4:
            endpoint.pump()
        return [parse(frame) for frame in self.carrier.take(0)]

    def asked(self) -> int:
        """C resolves: the tag by which A is asked."""
        remote = self.c_b.remote(self.reference)
        assert remote.resolve(self.told.append) is Result.OK
        ((kind, _, tag, body),) = self.turn()
        assert (kind, wire.parse_request(Kind.RESOLVE, body).hops) == (Kind.RESOLVE, 1)
        return tag

    def answer(self, tag: int, body: bytes) -> None:
        self.carrier.post(encode(Kind.ANSWER, tag, body))
        for endpoint in self.all * 4:
            endpoint.pump()

    def close(self) -> None:
        for endpoint in self.all:
            endpoint.destroy()
        assert not left_over(*self.all)


LEASE = wire.resolution(Lease(5, uuid4(), "of A and others", 0, PAGE, RW))


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    yield upstream
    upstream.close()


def test_an_upstream_that_answers_nonsense_ends_its_own_connection_only(upstream: Upstream) -> None:
    upstream.answer(upstream.asked(), b"nonsense")
    assert "an answer to RESOLVE" in upstream.b_a.reason
    assert [completion.error for completion in upstream.told] == [Refusal.NO_ROUTE]
    assert upstream.c_b.state is upstream.b_c.state is State.CONNECTED


def test_a_lease_that_is_of_no_use_goes_back_all_the_way(upstream: Upstream) -> None:
    upstream.answer(upstream.asked(), LEASE)
    assert upstream.told[0].result is Result.OK
    ((kind, _, tag, body),) = [parse(frame) for frame in upstream.carrier.take(0)]  # C does not map the region
    assert (kind, body) == (Kind.RELEASE, wire.lease_id(5))
    upstream.answer(tag, b"")
    upstream.carrier.post(encode(Kind.REVOKE, 1, wire.lease_id(5)))  # it was under way when the lease was released
    assert [(kind, tag, error) for kind, error, tag, _ in upstream.turn()] == [(Kind.ANSWER, 1, 0)]


def test_an_upstream_that_gives_one_lease_twice_loses_its_connection(upstream: Upstream) -> None:
    for tag in (upstream.asked(), upstream.asked()):
        upstream.carrier.post(encode(Kind.ANSWER, tag, LEASE))
    upstream.b_a.pump()
    assert "lease 5 was given twice" in upstream.b_a.reason
    upstream.b_c.pump()
    drive(upstream.b_c, upstream.c_b, until=lambda: len(upstream.told) == 2)
    assert [completion.error for completion in upstream.told] == [0, Refusal.NO_ROUTE]


def test_an_upstream_that_revokes_one_lease_twice_loses_its_connection(upstream: Upstream) -> None:
    upstream.carrier.post(encode(Kind.ANSWER, upstream.asked(), LEASE))
    for tag in (1, 2):
        upstream.carrier.post(encode(Kind.REVOKE, tag, wire.lease_id(5)))
    upstream.b_a.pump()
    assert "lease 5 was revoked twice" in upstream.b_a.reason


def test_an_upstream_that_is_lost_while_it_is_asked(upstream: Upstream) -> None:
    upstream.asked()
    upstream.carrier.close()
    for endpoint in upstream.all * 4:
        endpoint.pump()
    assert [completion.error for completion in upstream.told] == [Refusal.STALE]
    assert "where the reference came from is over" in upstream.told[0].reason


def test_a_request_that_went_round_in_a_circle_comes_to_an_end(upstream: Upstream) -> None:
    link: Any = upstream.c_b._party
    told: list[Completion] = []
    link.ask(Kind.RESOLVE, wire.request(upstream.reference, Access.READ, wire.MOST_HOPS), told.append)
    drive(*upstream.all, until=lambda: bool(told))
    assert (told[0].error, "came through 8 domains already" in told[0].reason) == (Refusal.NO_ROUTE, True)


class Keeping:
    """A broker that copies nothing and keeps its lease on the local buffer."""

    name = "a broker that keeps"

    def __init__(self, site: Site) -> None:
        self.site = site
        self.leases: list[int] = []
        self.done: Callable[[Completion], None] | None = None

    def copy(self, source: bytes, target: bytes, length: int, done: Callable[[Completion], None], *,
             source_offset: int = 0, target_offset: int = 0) -> Result:
        answer = self.site.exports.resolve(target, Access.WRITE, self)
        assert isinstance(answer, Lease)
        self.leases.append(answer.lease)
        self.done = done
        return Result.OK

    def revoke(self, lease: int) -> None:
        assert lease in self.leases


def test_a_broker_that_does_not_let_go_is_named_and_the_slot_stays_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = LocalRegion(size=SIZE), LocalRegion(size=SIZE)
    owner, holder = (Site(join(region, [0])[0]) for region in regions)
    broker = Keeping(holder)
    pair = Pair(owner, holder, broker=broker)
    remote = pair.front.remote(pair.back.register(owner.fill(bytes(PAGE)), RW).reference(), route=Route.HOST)
    told: list[Completion] = []
    page = holder.pool.allocate(PAGE)
    assert remote.receive_from(page, told.append) is Result.OK
    pair.until(lambda: broker.done is not None)
    assert broker.done is not None
    now = holder.exports._clock()
    monkeypatch.setattr(holder.exports, "_clock", lambda: now)
    broker.done(Completion(Result.OK))
    assert not told  # it may write there still
    monkeypatch.setattr(holder.exports, "_clock", lambda: now + 6)
    pair.until(lambda: bool(told))
    assert told[0].error == Refusal.HELD
    assert told[0].reason.startswith("the local buffer is held by a broker that keeps")
    assert holder.exports.registered == 1
    holder.exports.release(broker, broker.leases[0])
    assert holder.exports.registered == 0
    released = holder.pool.allocate(PAGE)
    holder.pool.release(released)
    completion = ended(partial(remote.receive_from, released), pair.front, pair.back)
    assert completion.error == Refusal.FAILED
    pair.close()
    for region in regions:
        region.close()


def test_an_operation_that_had_not_begun_when_the_connection_was_lost(pair: Pair) -> None:
    told: list[Completion] = []
    remote = pair.front.remote(pages(pair).reference())
    assert remote.resolve(told.append) is Result.OK
    assert remote.resolve() is Result.OK
    pair.front.disconnect()
    assert [completion.result for completion in told] == [Result.OUTCOME_UNKNOWN]
