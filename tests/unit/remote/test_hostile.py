"""A peer that breaks the rules of the frames about remote buffers, as owner and as holder.

It loses its connection, with a reason, and reads and writes nothing outside what was registered."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import pytest
from remote_support import SIZE, Site, drive, join, left_over
from support import LocalRegion

from idc.buffers import process_memory
from idc.endpoint import Completion, Endpoint, Quotas, Result, State
from idc.endpoint.frames import Kind, encode, hello, parse
from idc.errors import ProtocolError
from idc.layout import PAGE
from idc.remote import Access, Lease, OwnerCopy, Refusal, Registration, RemoteBuffer, wire
from idc.transport.local import LocalCarrier, LocalPort, meeting

if TYPE_CHECKING:
    from collections.abc import Iterator

RW = Access.READ | Access.WRITE
QUOTAS = Quotas(8, 8, 256, 256, asks=8, ask_bytes=1024)
SECRET = b"not for you"


class Rig:
    """An honest endpoint with a registered buffer and a remote one, against a peer frame by frame."""

    def __init__(self, accepts: Quotas = QUOTAS) -> None:
        self.shared = LocalRegion(size=SIZE)
        self.site = Site(join(self.shared, [0])[0])
        mine, self.port = meeting()
        self.endpoint: Endpoint = self.site.endpoint(mine)
        self.accepts = accepts
        self.memory = bytearray(SECRET + bytes(100) + SECRET)
        self.carrier: LocalCarrier = self.join(self.port)
        whole = process_memory(self.memory)
        self.registration: Registration = self.endpoint.register(whole.slice(len(SECRET), 100), RW)
        self.reference = self.registration.reference()
        self.told: list[Completion] = []

    def join(self, port: LocalPort) -> LocalCarrier:
        deadline = time.monotonic() + 10
        carrier = None
        while carrier is None:
            assert time.monotonic() < deadline
            port.look()
            self.endpoint.pump(0.01)
            carrier = port.connection()
        carrier.post(hello(self.accepts))
        drive(self.endpoint, until=lambda: self.endpoint.state is State.CONNECTED)
        carrier.take(0)  # its HELLO
        return carrier

    def send(self, kind: Kind, body: bytes = b"", tag: int = 1, error: int = 0) -> list[tuple[int, int, int, bytes]]:
        """What comes back."""
        self.carrier.post(encode(kind, tag, body, error))
        for _ in range(4):
            self.endpoint.pump()
        try:
            return [parse(frame) for frame in self.carrier.take(0)]
        except Exception:
            return []

    def remote(self, data: bytes | None = None) -> RemoteBuffer:
        """A remote buffer that the peer is asked for: its RESOLVE has gone out."""
        other = Site().exports.register(process_memory(bytearray(PAGE)), RW).reference()
        remote = self.endpoint.remote(other if data is None else data)
        assert remote.receive_from(process_memory(bytearray(PAGE)), self.told.append) is Result.OK
        self.endpoint.pump()
        return remote

    def close(self) -> None:
        self.endpoint.destroy()
        assert not left_over(self.endpoint)
        assert self.site.exports.registered == 0
        self.shared.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def body(rig: Rig, want: int = 1, hops: int = 0, zero: int = 0, offset: int = 0, length: int = 0,
         data: bytes = b"") -> bytes:
    return rig.reference + wire._REQUEST.pack(want, hops, zero, 0, offset, length) + data


@pytest.mark.parametrize(("kind", "fields", "reason"), [
    (Kind.PULL, {"length": 0}, "for no bytes"),
    (Kind.PULL, {"length": 4, "want": 2}, "with access 2"),
    (Kind.PULL, {"length": 4, "want": 8}, "with access 8"),
    (Kind.PULL, {"length": 4, "want": 0}, "with access 0"),
    (Kind.PULL, {"length": 4, "zero": 1}, "where zero is due"),
    (Kind.PULL, {"length": 4, "hops": 9}, "9 domains"),
    (Kind.PULL, {"length": 4, "data": b"x"}, "with 1 bytes of data"),
    (Kind.PUSH, {"length": 4, "want": 2, "data": b"abc"}, "for 4 bytes with 3"),
    (Kind.PUSH, {"length": 2, "want": 2, "data": b"abc"}, "for 2 bytes with 3"),
    (Kind.PUSH, {"length": 3, "want": 1, "data": b"abc"}, "with access 1"),
    (Kind.FILLED, {"length": 4, "want": 1}, "with access 1"),
    (Kind.FILLED, {"length": 4, "want": 2, "data": b"abc"}, "with 3 bytes of data"),
    (Kind.RESOLVE, {"length": 4}, "it has neither"),
    (Kind.RESOLVE, {"offset": 4}, "it has neither"),
    (Kind.RESOLVE, {"data": b"more"}, "with 4 bytes of data"),
])  # fmt: skip
def test_a_request_that_breaks_the_rules_ends_the_connection(
        rig: Rig, kind: Kind, fields: dict[str, object], reason: str) -> None:  # fmt: skip
    before = bytes(rig.memory)
    answers = rig.send(kind, body(rig, **fields))  # type: ignore[arg-type]
    assert reason in rig.endpoint.reason
    assert [answer[0] for answer in answers] == [Kind.BYE]
    assert rig.memory == before


@pytest.mark.parametrize(("kind", "content", "reason"), [
    (Kind.PULL, b"", "its head alone"),
    (Kind.RESOLVE, bytes(95), "its head alone"),
    (Kind.RELEASE, bytes(7), "of 7 bytes instead of 8"),
    (Kind.REVOKE, bytes(9), "of 9 bytes instead of 8"),
    (Kind.RELEASE, bytes(8), "has no lease 0"),
    (Kind.PUSH, bytes(5000), "5000 bytes sent, 4096 are accepted"),
    (Kind.ANSWER, b"", "not outstanding"),
])  # fmt: skip
def test_a_frame_that_breaks_the_rules_ends_the_connection(
        rig: Rig, kind: Kind, content: bytes, reason: str) -> None:  # fmt: skip
    rig.send(kind, content)
    assert rig.endpoint.state is not State.CONNECTED
    assert reason in rig.endpoint.reason


@pytest.mark.parametrize(("offset", "length"), [(0, 101), (100, 1), (1 << 63, 1), ((1 << 64) - 1, 1), (99, 900)])
@pytest.mark.parametrize("kind", [Kind.PULL, Kind.PUSH, Kind.FILLED])
def test_nothing_outside_the_registration_is_reached(rig: Rig, kind: Kind, offset: int, length: int) -> None:
    before = bytes(rig.memory)
    data = b"!" * length if kind == Kind.PUSH else b""
    ((answered, error, _, reason),) = rig.send(kind, body(rig, 1 if kind == Kind.PULL else 2, offset=offset,
                                                          length=length, data=data))
    assert (answered, error) == (Kind.ANSWER, Refusal.RANGE)
    assert SECRET not in reason
    assert rig.memory == before
    assert rig.endpoint.state is State.CONNECTED


def test_a_pull_for_very_much_is_answered_with_what_fits(rig: Rig) -> None:
    registration = rig.endpoint.register(process_memory(bytearray(1 << 20)), RW)
    rig.reference = registration.reference()
    ((_, error, _, answer),) = rig.send(Kind.PULL, body(rig, length=1 << 20))
    assert (error, len(answer)) == (0, QUOTAS.ask_bytes)
    assert wire.parse_moved(Kind.PULL, answer, 1 << 20)[1] == QUOTAS.ask_bytes - wire.MOVED_BYTES


def test_garbage_for_a_reference_is_refused_and_the_connection_stands(rig: Rig) -> None:
    chance = random.Random(7)
    for _ in range(300):
        reference = bytearray(rig.reference)
        for _ in range(chance.choice((1, 2, 40))):
            reference[chance.randrange(len(reference))] = chance.randrange(256)
        if reference == rig.reference:
            continue
        for kind, want in ((Kind.RESOLVE, 1), (Kind.PULL, 1), (Kind.FILLED, 2)):
            request = bytes(reference) + wire._REQUEST.pack(want, 0, 0, 0, 0, int(kind != Kind.RESOLVE))
            ((answered, error, _, _),) = rig.send(kind, request)
            assert answered == Kind.ANSWER
            assert error in (Refusal.MALFORMED, Refusal.FORGED, Refusal.STALE, Refusal.NO_ROUTE)
    assert rig.endpoint.state is State.CONNECTED


def test_random_frames_never_raise_and_end_with_a_reason() -> None:
    chance = random.Random(11)
    rig = Rig()
    for _ in range(300):
        kind = chance.choice(list(Kind)[6:])
        content = chance.choice((rig.reference, b"", bytes(8))) + chance.randbytes(chance.randrange(120))
        rig.send(kind, content, tag=chance.randrange(1 << 32))
        if rig.endpoint.state is not State.CONNECTED:
            assert rig.endpoint.reason
            assert rig.site.exports.registered == 0
            rig.close()
            rig = Rig()
    assert bytes(rig.memory).count(SECRET) == 2
    rig.close()


def test_more_requests_than_are_served_end_the_connection(rig: Rig) -> None:
    """REVOKE is what can be held back: of a lease that is in use."""
    rig.memory.clear()
    for tag in range(9):
        rig.carrier.post(encode(Kind.PULL, tag, body(rig, length=1)))
    rig.endpoint.pump()
    assert rig.endpoint.state is State.CONNECTED  # each was answered before the next
    assert len(rig.carrier.take(0)) == 9


def test_a_peer_that_asks_but_serves_nothing_is_refused() -> None:
    rig = Rig(Quotas())
    rig.send(Kind.PULL, body(rig, length=4))
    assert "takes no such requests itself" in rig.endpoint.reason
    rig.close()


def lease(rig: Rig, **fields: object) -> bytes:
    part = next(p for p in rig.site.pool_region.header.parts if p.owner == 1)
    answer = {"lease": 5, "region": rig.site.pool_region.header.uuid, "name": "local", "offset": part.offset,
              "length": PAGE, "access": RW} | fields
    return wire.resolution(Lease(**answer))  # type: ignore[arg-type]


@pytest.mark.parametrize(("fields", "reason"), [
    ({"offset": 0}, "not all in another member's part"),
    ({"offset": 1 << 63}, "not all in another member's part"),
    ({"offset": (1 << 64) - PAGE}, "not all in another member's part"),
    ({"length": PAGE + 1}, "4097 bytes to read and write, asked for 4096"),
    ({"access": Access.READ}, "to read, asked for 4096 to read and write"),
    ({"access": RW | Access.TAKE}, "to read and write and take"),
    ({"hops": 12}, "12 domains"),
])  # fmt: skip
def test_an_owner_that_leases_what_is_not_its_own_loses_the_connection(
        rig: Rig, fields: dict[str, object], reason: str) -> None:  # fmt: skip
    rig.remote()
    ((kind, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
    assert kind == Kind.RESOLVE
    rig.send(Kind.ANSWER, lease(rig, **fields), tag)
    assert reason in rig.endpoint.reason
    assert [completion.result for completion in rig.told] == [Result.OUTCOME_UNKNOWN]


def test_a_lease_on_this_members_own_pages_is_refused(rig: Rig) -> None:
    rig.remote()
    ((_, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
    rig.send(Kind.ANSWER, lease(rig, offset=rig.site.pool.offset), tag)
    assert "not all in another member's part" in rig.endpoint.reason


def test_one_lease_given_twice_and_revoked_twice(rig: Rig) -> None:
    first = rig.remote()
    ((_, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
    rig.send(Kind.ANSWER, lease(rig), tag)
    assert [completion.result for completion in rig.told] == [Result.OK]
    shared: list[object] = []
    first.share(lambda *what: shared.append(what))
    rig.endpoint.pump()
    assert shared
    assert rig.send(Kind.REVOKE, wire.lease_id(5), 1) == []  # until it is released
    assert first.withdrawn
    rig.send(Kind.REVOKE, wire.lease_id(5), 2)
    assert "lease 5 was revoked twice" in rig.endpoint.reason
    rig.carrier = rig.join(rig.port)
    for reason in ("", "lease 5 was given twice"):
        rig.remote()
        ((_, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
        rig.send(Kind.ANSWER, lease(rig), tag)
        assert reason in rig.endpoint.reason
    rig.registration = None  # type: ignore[assignment]


def test_the_end_of_a_lease_cannot_be_refused(rig: Rig) -> None:
    rig.remote().close()
    ((_, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
    ((kind, _, tag, _),) = rig.send(Kind.ANSWER, lease(rig), tag)
    assert kind == Kind.RELEASE
    rig.send(Kind.ANSWER, b"no", tag, error=4)
    assert "a lease that is over was refused: no" in rig.endpoint.reason


@pytest.mark.parametrize(("answer", "reason"), [
    (b"", "its head alone"),
    (wire.moved(1, 0), "moved 0 of"),
    (wire.moved(1, 8, b"1234567"), "with 7 of data"),
    (wire.moved(1, 5000, bytes(1000)), "moved 5000 of"),
    (b"\1\1" + bytes(14), "where zero is due"),
    (bytes(5000), "4096 are accepted"),
])  # fmt: skip
def test_an_answer_with_bytes_that_does_not_fit_ends_the_connection(rig: Rig, answer: bytes, reason: str) -> None:
    rig.remote()
    ((_, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
    ((kind, _, tag, _), *_) = rig.send(Kind.ANSWER, wire.resolution(OwnerCopy("memory")), tag)
    assert kind == Kind.PULL
    rig.send(Kind.ANSWER, answer, tag)
    assert reason in rig.endpoint.reason
    assert [completion.result for completion in rig.told] == [Result.OUTCOME_UNKNOWN]


@pytest.mark.parametrize("answer", [b"", b"\3" + bytes(7), b"\1\0" + bytes(6), b"\2\1" + bytes(6), b"\1\3" + bytes(9),
                                    b"\2" + bytes(7), b"\2" + bytes(400), b"\1\3\0\1" + bytes(108)])
def test_an_answer_to_resolve_that_is_none_is_refused(answer: bytes) -> None:
    with pytest.raises(ProtocolError, match="answer to RESOLVE"):
        wire.parse_resolution(answer)


@pytest.mark.parametrize("answer", [
    Lease(1 << 63, uuid4(), "n" * 64, 1 << 40, 5, Access.READ, 8), OwnerCopy("why", None, 3),
    OwnerCopy("", UUID(int=7))])
def test_answers_survive_the_way(answer: Lease | OwnerCopy) -> None:
    assert wire.parse_resolution(wire.resolution(answer)) == answer


def test_a_refusal_of_a_kind_that_is_not_known_is_passed_on(rig: Rig) -> None:
    rig.remote()
    ((_, _, tag, _),) = [parse(frame) for frame in rig.carrier.take(0)]
    rig.send(Kind.ANSWER, b"\x1b[31mno", tag, error=777)
    assert rig.told == [Completion(Result.ERROR, 777, reason="?[31mno")]
