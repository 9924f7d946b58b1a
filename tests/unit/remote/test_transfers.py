"""Two domains: transfers by each route, strategies, quiescence, the end of a connection, and each mistake by name."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from remote_support import Pair, Site, ended, join, left_over
from support import LocalRegion

from idc.buffers import LocalBuffer, MemfdStore, Strategy, file_range, process_memory
from idc.endpoint import Client, Completion, Endpoint, Resources, Result, State
from idc.errors import BackPressuredError, MisuseError, NotConnectedError
from idc.layout import PAGE
from idc.remote import Access, Borrowed, Refusal, Registration, RemoteBuffer, Route, Worth
from idc.remote import transfer as transfers
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RW = Access.READ | Access.WRITE
DATA = os.urandom(3 * PAGE + 77)


@pytest.fixture
def shared() -> Iterator[LocalRegion]:
    region = LocalRegion(size=1 << 22)
    yield region
    region.close()


@pytest.fixture
def pair(shared: LocalRegion) -> Iterator[Pair]:
    one, other = join(shared)
    pair = Pair(Site(one), Site(other))
    yield pair
    pair.close()


@pytest.fixture
def apart() -> Iterator[Pair]:
    pair = Pair(Site(), Site())
    yield pair
    pair.close()


def offered(pair: Pair, data: bytes = DATA, access: Access = RW, **options: Any) -> tuple[Registration, RemoteBuffer]:
    registration = pair.back.register(pair.owner.fill(data, 33), access, **options)
    return registration, pair.front.remote(registration.reference())


def taken(pair: Pair, remote: RemoteBuffer) -> bytes:
    target = bytearray(len(remote))
    assert pair.ended(lambda done: remote.receive_from(process_memory(target), done)).result is Result.OK
    return bytes(target)


def test_pages_that_both_map_are_copied_once_and_keep_their_alignment(pair: Pair) -> None:
    registration, remote = offered(pair)
    page = pair.holder.pool.allocate_like(remote)
    assert page.offset_in_page == remote.offset_in_page == 33
    assert pair.ended(lambda done: remote.receive_from(page, done)).result is Result.OK
    assert bytes(pair.holder.pool.view(page)) == DATA
    assert (remote.route, remote.refusal, remote.counter.copied) == (Route.DIRECT, Worth.SOFT, len(DATA))
    assert pair.owner.exports.counter.copied == 0
    assert registration.holders == ["the holder"]
    turned = process_memory(DATA[::-1])
    assert pair.ended(lambda done: remote.send_to(turned, done)).result is Result.OK
    assert bytes(pair.owner.pool.view(registration.buffer)) == DATA[::-1]


@pytest.mark.parametrize("route", [Route.DIRECT, Route.OWNER])
@pytest.mark.parametrize("skew", [0, 1, 4095])
def test_the_offset_in_the_page_survives_each_route(pair: Pair, route: Route, skew: int) -> None:
    """Whoever receives pages at the same offset can share them on."""
    registration = pair.back.register(pair.owner.fill(bytes(8) + DATA, skew), RW)
    memory = pair.back.register(process_memory(bytearray(bytes(8) + DATA)), RW)
    for one in (registration, memory) if route is Route.OWNER else (registration,):
        remote = pair.front.remote(one.reference(8), route=route)
        assert remote.offset_in_page == one.buffer.slice(8, 1).offset_in_page
        page = pair.holder.pool.allocate_like(remote)
        assert pair.ended(partial(remote.receive_from, page)).result is Result.OK
        assert page.offset_in_page == remote.offset_in_page
        passed_on = pair.holder.exports.registry.share(page)
        assert passed_on.offset_in_page == remote.offset_in_page
        assert bytes(pair.holder.pool.view(page)) == DATA


def test_process_memory_goes_by_owner_copy_in_pieces(apart: Pair) -> None:
    memory = bytearray(DATA)
    registration = apart.back.register(process_memory(memory), RW)
    remote = apart.front.remote(registration.reference(5, 9000))
    assert taken(apart, remote) == DATA[5:9005]
    assert (remote.route, remote.refusal) == (Route.OWNER, Worth.HARD)
    assert remote.counter.copied == 2 * 9000
    assert apart.owner.exports.counter.copied == 9000
    assert apart.ended(lambda done: remote.send_to(process_memory(b"x" * 100), done, offset=8900)).result is Result.OK
    assert memory[8904:9006] == DATA[8904:8905] + b"x" * 100 + DATA[9005:9006]
    assert registration.holders == []


@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("writing", [False, True])
def test_what_cannot_go_as_forced_is_an_error_and_never_goes_otherwise(pair: Pair, route: Route, *,
                                                                      writing: bool) -> None:
    registration, _ = offered(pair)
    remote = pair.front.remote(registration.reference(), route=route)
    local = process_memory(bytearray(len(DATA)))
    completion = pair.ended(lambda done: (remote.send_to if writing else remote.receive_from)(local, done))
    copies = {Route.DIRECT: 1, Route.OWNER: 2}.get(route, 0)
    assert remote.counter.copied == copies * len(DATA)
    if copies:
        assert (completion.result, remote.route) == (Result.OK, route)
    else:
        assert (completion.result, completion.error) == (Result.ERROR, Refusal.FORCED)
        assert completion.reason.startswith(f"{route.value} is forced, but ")
    assert bool(registration.holders) == (route is Route.DIRECT)


def test_an_owner_that_gives_no_leases_is_asked_for_the_bytes_but_who_maps_them_is_refused_softly(pair: Pair) -> None:
    _, remote = offered(pair, direct=False)
    assert taken(pair, remote) == DATA
    assert (remote.route, remote.refusal) == (Route.OWNER, Worth.SOFT)


def test_a_holder_with_all_its_leases_is_served_by_owner_copy(shared: LocalRegion) -> None:
    one, other = join(shared)
    pair = Pair(Site(one, leases=1), Site(other))
    remotes = [offered(pair)[1] for _ in range(2)]
    assert [(taken(pair, remote), remote.route) for remote in remotes] == [(DATA, Route.DIRECT), (DATA, Route.OWNER)]
    remotes[0].close()
    pair.close()


@pytest.mark.parametrize("kind", ["hidden", "file"])
def test_a_buffer_of_any_type_can_be_registered_and_what_it_cannot_do_is_said(apart: Pair, kind: str) -> None:
    with MemfdStore(4 * PAGE) as store:
        if kind == "hidden":
            completion, expected = _pull(apart, store.allocate(100)), "hidden pages"
        else:
            fd = os.memfd_create("short")
            completion, expected = _pull(apart, file_range(fd, 0, 100)), "after 0"
            os.close(fd)
    assert (completion.result, completion.error) == (Result.ERROR, Refusal.FAILED)
    assert expected in completion.reason


def _pull(pair: Pair, buffer: LocalBuffer) -> Completion:
    remote = pair.front.remote(pair.back.register(buffer, RW).reference())
    return pair.ended(lambda done: remote.receive_from(process_memory(bytearray(100)), done))


def test_many_transfers_are_bounded_by_slots(apart: Pair) -> None:
    remote = apart.front.remote(apart.back.register(process_memory(bytearray(100_000)), RW).reference())
    told: list[Completion] = []
    results = [remote.receive_from(process_memory(bytearray(20_000)), told.append, offset=n) for n in range(5)]
    assert results == [Result.OK] * 4 + [Result.BACK_PRESSURED]
    apart.until(lambda: len(told) == 4)
    assert {completion.result for completion in told} == {Result.OK}
    assert remote.receive_from(process_memory(bytearray(1)), told.append) is Result.OK
    apart.until(lambda: len(told) == 5)


def test_what_is_shared_by_a_copy_takes_one_slot(apart: Pair) -> None:
    remote = apart.front.remote(apart.back.register(process_memory(bytearray(50_000)), RW).reference())
    told: list[Completion] = []
    results = [remote.share(lambda completion, _: told.append(completion)) for _ in range(3)]
    for _ in range(8):
        apart.front.pump()
        apart.back.pump()
    assert not told
    results += [remote.share(lambda completion, _: told.append(completion)) for _ in range(2)]
    assert results == [Result.OK] * 4 + [Result.BACK_PRESSURED]
    apart.until(lambda: len(told) == 4)
    assert {completion.result for completion in told} == {Result.OK}


def test_tables_are_bounded_and_nothing_is_half_made(pair: Pair) -> None:
    buffer = pair.owner.fill(DATA)
    registrations = [pair.back.register(buffer, RW) for _ in range(8)]
    with pytest.raises(BackPressuredError, match="all 8 registrations"):
        pair.back.register(buffer, RW)
    remotes = [pair.front.remote(registrations[0].reference()) for _ in range(8)]
    with pytest.raises(BackPressuredError, match="8 remote buffers"):
        pair.front.remote(registrations[0].reference())
    remotes[0].close()
    pair.front.remote(registrations[0].reference())
    registrations[0].unregister()
    pair.back.register(buffer, RW)


def test_the_owner_is_told_what_is_filled(pair: Pair) -> None:
    told: list[tuple[int, int]] = []
    registration, whole = offered(pair, filled=lambda *what: told.append(what))
    part = pair.front.remote(registration.reference(100, 50))
    assert pair.ended(lambda done: whole.filled(done=done)).result is Result.OK
    abc = process_memory(b"abc")
    assert pair.ended(lambda done: part.send_to(abc, done, offset=7, filled=True)).result is Result.OK
    assert told == [(0, len(DATA)), (107, 3)]
    assert bytes(pair.owner.pool.view(registration.buffer)[107:110]) == b"abc"


def test_a_callback_that_raises_is_the_holders_to_know(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def raising(offset: int, length: int) -> None:
        raise ValueError(f"{offset} {length}")

    registration, remote = offered(pair, filled=raising)
    completion = pair.ended(lambda done: remote.filled(1, 2, done))
    assert (completion.error, completion.reason) == (Refusal.FAILED, "ValueError: 1 2")
    assert "failed" in caplog.text
    assert pair.front.state is pair.back.state is State.CONNECTED
    assert registration.live


def test_unregistering_from_within_its_own_callback(pair: Pair) -> None:
    told: list[Completion] = []
    registration: Registration

    def unregister(offset: int, length: int) -> None:
        registration.unregister(told.append)

    registration, remote = offered(pair, filled=unregister)
    assert taken(pair, remote) == DATA
    assert pair.ended(lambda done: remote.filled(done=done)).result is Result.OK
    pair.until(lambda: bool(told))
    assert told == [Completion(Result.OK)]
    assert (pair.owner.exports.registered, pair.owner.exports.leases) == (0, 0)


def test_a_connection_ended_from_within_a_callback(pair: Pair) -> None:
    _, remote = offered(pair, filled=lambda *_: pair.back.disconnect())
    assert pair.ended(lambda done: remote.filled(done=done)).result is Result.OUTCOME_UNKNOWN
    pair.connect()


def test_use_after_unregister_is_refused_and_pages_go_back_to_their_pool(pair: Pair) -> None:
    free = pair.owner.pool.free_pages
    registration, remote = offered(pair)
    unused = pair.front.remote(registration.reference())
    assert taken(pair, remote) == DATA
    pair.owner.pool.release(registration.buffer)
    assert pair.owner.pool.free_pages < free  # the registration holds them
    told: list[Completion] = []
    registration.unregister(told.append)
    assert not told
    assert not registration.live
    with pytest.raises(MisuseError, match="being unregistered already"):
        registration.unregister()
    pair.until(lambda: bool(told))
    assert told == [Completion(Result.OK)]
    assert pair.owner.pool.free_pages == free
    for used, refusal in ((remote, Refusal.WITHDRAWN), (unused, Refusal.STALE)):
        completion = pair.ended(partial(used.receive_from, process_memory(bytearray(4))))
        assert completion.error == refusal
    with pytest.raises(MisuseError, match="unregistered before"):
        registration.unregister()
    with pytest.raises(MisuseError, match="no references"):
        registration.reference()


@pytest.mark.parametrize("released", [True, False])
def test_an_owner_that_raises_when_its_buffer_is_quiet_raises_in_its_own_pump_and_keeps_the_connection(
        pair: Pair, *, released: bool) -> None:  # fmt: skip
    def raising(completion: Completion) -> None:
        raise RuntimeError("as asked")

    registration, remote = offered(pair)
    got = borrowed(pair, remote, "share")
    registration.unregister(raising)
    if released:  # a RELEASE crosses the REVOKE
        remote.close()
    got.release()
    with pytest.raises(RuntimeError, match="as asked"):
        pair.until(lambda: False)
    pair.until(lambda: pair.owner.exports.registered == 0)
    remote.close()
    pair.until(lambda: not left_over(pair.front, pair.back))
    assert pair.front.connections == pair.back.connections == 1


def test_a_release_that_waits_for_a_slot_does_not_come_after_the_lease_was_revoked(shared: LocalRegion) -> None:
    one, other = join(shared)
    pair = Pair(Site(one), Site(other), asks=1)
    registration, leased = offered(pair)
    slow = pair.front.remote(pair.back.register(process_memory(bytearray(50_000)), RW).reference())
    for remote in (leased, slow):
        pair.ended(remote.resolve)
    told: list[Completion] = []
    slow.receive_from(process_memory(bytearray(50_000)), told.append)
    pair.front.pump()
    leased.close()
    registration.unregister(told.append)
    for _ in range(2):
        pair.front.pump()  # takes REVOKE first
    slow.close()
    pair.until(lambda: len(told) == 2 and not left_over(pair.front))
    assert {completion.result for completion in told} == {Result.OK}
    assert pair.front.connections == pair.back.connections == 1
    pair.close()


def test_unregister_waits_for_a_transfer_that_is_under_way(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "STEP", PAGE)
    registration, remote = offered(pair, bytes(64 * PAGE))
    pair.ended(remote.resolve)
    order: list[str] = []
    target = process_memory(bytearray(len(remote)))
    remote.receive_from(target, lambda _: order.append("transfer"))
    pair.front.pump()
    registration.unregister(lambda _: order.append("unregister"))
    pair.until(lambda: len(order) == 2)
    assert order == ["transfer", "unregister"]


def test_an_owner_copy_under_way_is_cut_short_by_unregister(apart: Pair) -> None:
    registration = apart.back.register(process_memory(bytearray(1 << 20)), RW)
    remote = apart.front.remote(registration.reference())
    told: list[Completion] = []
    remote.receive_from(process_memory(bytearray(1 << 20)), told.append)
    for _ in range(6):
        apart.front.pump()
        apart.back.pump()
    assert not told
    assert 0 < apart.owner.exports.counter.copied < 1 << 20
    done: list[Completion] = []
    registration.unregister(done.append)
    assert done == [Completion(Result.OK)]  # at once: nothing but this library touches the buffer
    copied = apart.owner.exports.counter.copied
    apart.until(lambda: bool(told))
    assert (told[0].result, told[0].error) == (Result.ERROR, Refusal.STALE)
    assert apart.owner.exports.counter.copied == copied


def test_shared_pages_follow_the_owner_until_they_are_written(pair: Pair) -> None:
    registration, remote = offered(pair)
    got = borrowed(pair, remote, "share")
    assert (got.strategy, remote.counter.copied, remote.counter.mapped) == (Strategy.MAP, 0, len(DATA))
    view = pair.owner.pool.view(registration.buffer)
    view[0] ^= 0xFF
    assert look(pair, got)[:10] == bytes(view[:10])
    pair.holder.exports.registry.copy(process_memory(b"mine"), got.buffer.slice(0, 4))
    view[4] ^= 0xFF
    assert look(pair, got)[:10] == b"mine" + DATA[4:10]
    assert bytes(view[:4]) != b"mine"
    assert look(pair, got)[PAGE:] == DATA[PAGE:]
    view.release()
    told: list[Completion] = []
    registration.unregister(told.append, timeout=0.05)
    pair.until(lambda: bool(told))
    assert (told[0].result, told[0].error) == (Result.ERROR, Refusal.HELD)
    assert told[0].reason.startswith("held by the holder")
    registration.unregister(told.append)
    got.release()
    got.release()
    pair.until(lambda: len(told) == 2)
    assert told[1].result is Result.OK


def borrowed(pair: Pair, remote: RemoteBuffer, how: str) -> Borrowed:
    completion, got = borrow(pair, remote, how)
    assert completion.result is Result.OK
    assert got is not None
    return got


def borrow(pair: Pair, remote: RemoteBuffer, how: str) -> tuple[Completion, Borrowed | None]:
    told: list[tuple[Completion, Borrowed | None]] = []
    assert getattr(remote, how)(lambda *what: told.append(what)) is Result.OK
    pair.until(lambda: bool(told))
    return told[0]


def look(pair: Pair, got: Borrowed) -> bytes:
    found = bytearray(len(got.buffer))
    pair.holder.exports.registry.copy(got.buffer, process_memory(found))
    return bytes(found)


def test_a_holder_is_told_that_its_shared_pages_are_wanted_back(pair: Pair) -> None:
    registration, _ = offered(pair)
    got: Borrowed

    def revoked() -> None:
        got.release()

    remote = pair.front.remote(registration.reference(), revoked=revoked)
    got = borrowed(pair, remote, "share")
    told: list[Completion] = []
    registration.unregister(told.append)
    pair.until(lambda: bool(told))
    assert told == [Completion(Result.OK)]


def test_pages_change_hands_and_come_back(pair: Pair) -> None:
    back: list[str] = []
    registration, remote = offered(pair, access=RW | Access.TAKE, returned=lambda: back.append("back"))
    assert taken(pair, remote) == DATA  # with a lease of its own, which goes first
    got = borrowed(pair, remote, "move")
    assert (got.strategy, remote.counter.handed) == (Strategy.HANDOVER, len(DATA))
    assert registration.taker is not None
    other = pair.front.remote(registration.reference(access=Access.READ))
    completion = pair.ended(lambda done: other.receive_from(process_memory(bytearray(4)), done))
    assert (completion.error, "handed over to the holder" in completion.reason) == (Refusal.BUSY, True)
    pair.holder.exports.registry.copy(process_memory(b"new"), got.buffer.slice(0, 3))
    assert look(pair, got) == b"new" + DATA[3:]
    got.release()
    pair.until(lambda: bool(back))
    assert back == ["back"]
    assert not registration.handed
    assert taken(pair, other) == b"new" + DATA[3:]


def test_moving_a_buffer_that_is_just_being_resolved_asks_for_no_second_lease(pair: Pair) -> None:
    _, remote = offered(pair, access=RW | Access.TAKE)
    told: list[Completion] = []
    for begin in (remote.resolve, lambda done: remote.move(lambda completion, _: done(completion)), remote.resolve):
        assert begin(told.append) is Result.OK
        pair.front.pump()
    pair.until(lambda: len(told) == 3)
    assert [completion.error for completion in told] == [0, 0, Refusal.BUSY]  # its own lease was under way
    assert pair.owner.exports.leases == 1
    remote.close()
    pair.until(lambda: not left_over(pair.front, pair.back))


def test_pages_that_others_hold_are_not_handed_over(pair: Pair) -> None:
    registration, remote = offered(pair, access=RW | Access.TAKE)
    other = pair.front.remote(registration.reference())
    assert taken(pair, other) == DATA
    completion, _ = borrow(pair, remote, "move")
    assert (completion.error, "held by the holder" in completion.reason) == (Refusal.BUSY, True)
    got = borrowed(pair, other, "share")
    assert borrow(pair, other, "move")[0].error == Refusal.BUSY
    got.release()
    other.close()
    got = borrowed(pair, remote, "move")
    told: list[Completion] = []
    registration.unregister(told.append)
    pair.front.pump()
    got.release()
    pair.until(lambda: bool(told))
    assert told == [Completion(Result.OK)]


@pytest.mark.parametrize(("how", "forced", "strategy"), [
    ("share", None, Strategy.COPY), ("share", Strategy.COPY, Strategy.COPY), ("share", Strategy.MAP, None),
    ("move", None, Strategy.COPY), ("move", Strategy.COPY, Strategy.COPY), ("move", Strategy.HANDOVER, None)])
def test_what_is_not_mapped_here_is_copied_unless_another_strategy_is_forced(
        how: str, forced: Strategy | None, strategy: Strategy | None) -> None:
    pair = Pair(Site(), Site(), strategy=forced)
    remote = pair.front.remote(pair.back.register(process_memory(bytearray(DATA)), RW | Access.TAKE).reference())
    completion, got = borrow(pair, remote, how)
    if strategy is None:
        assert forced is not None
        assert completion.reason.startswith(f"{forced.value} is forced, but ")
        assert (completion.error, got, remote.counter.copied) == (Refusal.FORCED, None, 0)
    else:
        assert got is not None
        assert (got.strategy, look(pair, got), remote.counter.copied) == (strategy, DATA, 2 * len(DATA))
        got.release()
    pair.close()


@pytest.mark.parametrize("how", ["share", "move"])
def test_copy_can_be_forced_where_pages_could_be_used_in_place(shared: LocalRegion, how: str) -> None:
    one, other = join(shared)
    pair = Pair(Site(one), Site(other), strategy=Strategy.COPY)
    _, remote = offered(pair, access=RW | Access.TAKE)
    got = borrowed(pair, remote, how)
    assert (got.strategy, look(pair, got), remote.counter.copied) == (Strategy.COPY, DATA, len(DATA))
    assert (remote.counter.handed, remote.counter.mapped) == (0, 0)
    pair.close()


def test_a_lost_connection_takes_everything_of_it_along(pair: Pair) -> None:
    registration, remote = offered(pair, access=RW | Access.TAKE)
    stays = pair.back.register(pair.owner.fill(DATA), RW, outlives=True)
    kept = pair.front.remote(stays.reference())
    shared, moved = borrowed(pair, kept, "share"), borrowed(pair, remote, "move")
    mine = pair.owner.pool.allocate(PAGE)
    told: list[Completion] = []
    for n in range(4):
        assert kept.receive_from(process_memory(bytearray(100)), told.append, offset=n) is Result.OK
    pair.front.pump()
    pair.back.disconnect()
    pair.until(lambda: len(told) == 4)
    assert {completion.result for completion in told} <= {Result.OK, Result.OUTCOME_UNKNOWN}
    assert not left_over(pair.front, pair.back)
    assert (registration.live, stays.live) == (False, True)
    assert (pair.owner.exports.registered, pair.owner.exports.leases) == (1, 0)
    assert shared.lost
    assert moved.lost
    shared.release()
    moved.release()
    assert remote.receive_from(process_memory(bytearray(1))) is Result.CLOSED
    pair.connect()
    assert kept.receive_from(process_memory(bytearray(1))) is Result.CLOSED
    again = pair.front.remote(stays.reference())
    assert taken(pair, again) == DATA
    stale = pair.front.remote(remote.data)
    assert pair.ended(lambda done: stale.filled(done=done)).error == Refusal.STALE
    again.close()
    stays.unregister()
    pair.owner.pool.release(mine)


def test_a_reference_to_a_slot_that_is_used_again_is_stale_and_not_taken_for_forged(pair: Pair) -> None:
    old: dict[int, bytes] = {}
    for _ in range(8):
        registration, remote = offered(pair)
        old[remote.reference.slot] = remote.data
        remote.close()
        registration.unregister()
    assert len(old) == 8  # the one that was free longest comes first
    _, now = offered(pair)
    stale = pair.front.remote(old[now.reference.slot])
    assert pair.ended(stale.resolve).error == Refusal.STALE


def test_a_closed_buffer_whose_pages_were_handed_over_is_free_once_they_are_given_back(pair: Pair) -> None:
    registration, remote = offered(pair, access=RW | Access.TAKE)
    got = borrowed(pair, remote, "move")
    remote.close()
    assert look(pair, got) == DATA
    got.release()
    pair.until(lambda: not registration.handed and not left_over(pair.front))


def test_a_reference_of_a_former_incarnation_is_stale(pair: Pair) -> None:
    old = Site(domain=pair.owner.exports.domain)
    _, theirs = meeting()
    endpoint = old.endpoint(theirs)
    reference = endpoint.register(process_memory(b"old"), Access.READ, outlives=True).reference()
    completion = pair.ended(lambda done: pair.front.remote(reference).receive_from(process_memory(bytearray(3)), done))
    assert (completion.error, "former incarnation" in completion.reason) == (Refusal.STALE, True)
    endpoint.destroy()


def test_ones_own_buffer_that_comes_back_is_used_without_asking(pair: Pair) -> None:
    told: list[tuple[int, int]] = []
    registration = pair.back.register(process_memory(bytearray(DATA)), RW, filled=lambda *what: told.append(what))
    remote = pair.back.remote(registration.reference(3, 10))
    target = bytearray(10)
    assert pair.ended(lambda done: remote.receive_from(process_memory(target), done)).result is Result.OK
    assert (bytes(target), remote.route, remote.counter.copied) == (DATA[3:13], Route.DIRECT, 10)
    assert pair.ended(lambda done: remote.filled(1, 2, done)).result is Result.OK
    assert told == [(4, 2)]
    registration.unregister()
    assert pair.ended(lambda done: remote.receive_from(process_memory(target), done)).error == Refusal.STALE


def test_a_member_that_may_only_read_reads_directly_and_writes_through_the_owner(shared: LocalRegion) -> None:
    one, other = join(shared)
    other.member = None  # as a read-only member's region says
    pair = Pair(Site(one), Site(other))
    _, remote = offered(pair)
    assert taken(pair, remote) == DATA
    assert str(remote.route) == "Route.DIRECT"
    assert (remote.refusal_of(Access.READ), remote.refusal_of(Access.WRITE)) == (Worth.SOFT, Worth.HARD)
    assert pair.ended(lambda done: remote.send_to(process_memory(b"x"), done)).result is Result.OK
    assert remote.route is Route.OWNER
    pair.close()


@pytest.mark.parametrize(("offset", "length"), [(0, len(DATA) + 1), (len(DATA), 1), (-1, 1), (1 << 64, 1)])
def test_ranges_outside_the_remote_buffer_are_the_callers_mistake(pair: Pair, offset: int, length: int) -> None:
    _, remote = offered(pair)
    local = process_memory(bytearray(length))
    for call in (remote.receive_from, remote.send_to):
        with pytest.raises(MisuseError, match="no range of the remote buffer"):
            call(local, offset=offset)
    with pytest.raises(MisuseError, match="no range of the remote buffer"):
        remote.filled(offset, length)


def test_the_wrong_rights_are_refused_before_anything_is_asked(pair: Pair) -> None:
    registration, _ = offered(pair, access=Access.READ)
    remote = pair.front.remote(registration.reference())
    with pytest.raises(MisuseError, match="allows to read, not to write"):
        remote.send_to(process_memory(b"x"))
    with pytest.raises(MisuseError, match="allows to read, not to write"):
        remote.filled()
    with pytest.raises(MisuseError, match="access to write in a reference to a registration with access to read"):
        registration.reference(access=Access.WRITE)
    with pytest.raises(MisuseError, match="READ, WRITE, TAKE, or several"):
        pair.back.register(process_memory(b""), Access(0))


@pytest.mark.parametrize(("offset", "length"), [(0, len(DATA) + 1), (-1, 2), (len(DATA) + 1, None)])
def test_a_reference_to_more_than_was_registered_is_not_minted(pair: Pair, offset: int, length: int | None) -> None:
    registration, _ = offered(pair)
    with pytest.raises(MisuseError, match="no range"):
        registration.reference(offset, length)


@pytest.mark.parametrize(("change", "refusal"), [
    (lambda b: b[:4] + bytes([b[4] | 4]) + b[5:], Refusal.FORGED),  # more rights
    (lambda b: b[:40] + (0).to_bytes(8, "little") + b[48:], Refusal.FORGED),  # another offset
    (lambda b: b[:48] + (1 << 20).to_bytes(8, "little") + b[56:], Refusal.FORGED),  # longer
    (lambda b: b[:-1] + bytes([b[-1] ^ 1]), Refusal.FORGED),
    (lambda b: b[:32] + (7).to_bytes(4, "little") + b[36:], Refusal.STALE),  # a slot that was never used
    (lambda b: b[:32] + (99).to_bytes(4, "little") + b[36:], Refusal.FORGED),
    (lambda b: b[:36] + (5).to_bytes(4, "little") + b[40:], Refusal.STALE),  # another generation
    (lambda b: b[:24] + bytes(8) + b[32:], Refusal.STALE),  # another incarnation
    (lambda b: b[:8] + bytes(16) + b[24:], Refusal.NO_ROUTE),  # another domain
])  # fmt: skip
def test_a_reference_that_was_changed_is_refused_by_the_owner(
        pair: Pair, change: Callable[[bytes], bytes], refusal: Refusal) -> None:  # fmt: skip
    registration, _ = offered(pair)
    forged = change(registration.reference(10, 20))
    remote = pair.front.remote(forged)
    for begin in (partial(remote.receive_from, process_memory(bytearray(1))), remote.resolve,
                  partial(remote.filled, 0, 1)):
        completion = pair.ended(begin)
        assert (completion.result, completion.error) == (Result.ERROR, refusal)
        assert completion.reason
    assert pair.owner.exports.leases == 0


@pytest.mark.parametrize("bad", [b"", bytes(72), b"IDR1" + bytes(68), b"\xff" * 72, b"x" * 1000])
def test_bytes_that_are_no_reference_are_refused_here(pair: Pair, bad: bytes) -> None:
    with pytest.raises(MisuseError, match="reference"):
        pair.front.remote(bad)


def test_truncated_and_lengthened_references_are_refused(pair: Pair) -> None:
    registration, _ = offered(pair)
    for bad in (registration.reference()[:-1], registration.reference() + b"\0"):
        with pytest.raises(MisuseError, match=f"not {len(bad)}"):
            pair.front.remote(bad)


def test_released_buffers_are_refused_at_once_and_in_transfers(pair: Pair) -> None:
    _, remote = offered(pair)
    gone = pair.owner.pool.allocate(10)
    pair.owner.pool.release(gone)
    with pytest.raises(MisuseError, match="released already"):
        pair.back.register(gone, RW)
    assert pair.owner.exports.registered == 1
    local = pair.holder.pool.allocate(10)
    pair.holder.pool.release(local)
    completion = pair.ended(lambda done: remote.receive_from(local, done))
    assert (completion.error, "released already" in completion.reason) == (Refusal.FAILED, True)


def test_nothing_works_without_connection_or_resources() -> None:
    mine, theirs = meeting()
    site = Site()
    endpoint = site.endpoint(mine)
    with pytest.raises(NotConnectedError, match="outlives=True"):
        endpoint.register(process_memory(b"x"), Access.READ)
    stays = endpoint.register(process_memory(b"x"), Access.READ, outlives=True)
    with pytest.raises(NotConnectedError, match="there is none"):
        endpoint.remote(stays.reference())
    plain = Endpoint(theirs, Client(), Resources())
    with pytest.raises(MisuseError, match="no resources for remote buffers"):
        plain.register(process_memory(b"x"), Access.READ)
    while not endpoint.state is plain.state is State.CONNECTED:
        endpoint.pump()
        plain.pump()
    other = Site().exports.register(process_memory(b"x"), Access.READ)
    completion = ended(endpoint.remote(other.reference()).resolve, endpoint, plain)
    assert completion.error == Refusal.NOT_SERVED
    for one in (endpoint, plain):
        one.destroy()
    assert stays.live
    stays.unregister()


def test_a_carrier_too_short_for_requests_is_refused_with_both_numbers() -> None:
    mine, theirs = meeting(frame_bytes=263)
    endpoint = Site().endpoint(mine)
    theirs.look()
    endpoint.pump()
    assert theirs.connection() is not None
    endpoint.pump(0.1)
    assert "hold 263 bytes, the quotas need 264" in endpoint.reason
    endpoint.destroy()


def test_a_wait_that_is_over_by_the_clock_ends_the_sleep(pair: Pair) -> None:
    registration, remote = offered(pair)
    borrowed(pair, remote, "share")
    told: list[Completion] = []
    registration.unregister(told.append, timeout=0.1)
    assert pair.back.patience is not None
    began = time.monotonic()
    while not told:
        pair.back.pump(5.0)
    assert time.monotonic() - began < 4.0
    assert pair.back.patience is None
