"""`Caller.transact` over shared memory, where the core tells an answer from what is none; how often answers ring."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from support import LocalRegion

from idc.endpoint import Client, Endpoint, Resources, State
from idc.endpoint.blocking import Caller
from idc.endpoint.frames import Kind, Quotas, encode, hello
from idc.errors import HandlerFailedError, OutcomeUnknownError, TransactionError
from idc.layout import ChannelSpec
from idc.layout import Kind as ChannelKind
from idc.transport.local import meeting
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.endpoint import IncomingMessage, IncomingTransaction
    from idc.transport.shared import SharedCarrier

CHANNELS = (ChannelSpec("calls", ChannelKind.MESSAGE, "front", "back", 128 * 512, 512),)
#: Of the first transaction of an endpoint, and of the one after it.
FIRST, SECOND = 0x10000, 0x20001


class Serving(Client):
    """Echoes, and keeps messages."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(transaction.parameters)

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.bodies.append(message.body)
        message.complete()


@contextlib.contextmanager
def caller(client: Client | None = None) -> Iterator[tuple[Caller, SharedCarrier]]:
    region = LocalRegion(CHANNELS)
    try:
        with region.join(0) as front, region.join(1) as back:
            mine, theirs = (SharedPort(mapped, "calls", spin=0.0, release=lambda: None) for mapped in (front, back))
            made, peer = Caller(mine, Resources(), client), None
            for _ in range(50):
                made.endpoint.pump(0.0)
                theirs.look()
                peer = peer or theirs.connection()
            assert peer is not None
            peer.post(hello(Quotas()))
            made.connect(10)
            assert len(peer.take(0.0)) == 1  # its HELLO
            try:
                yield made, peer
            finally:
                made.close()
                theirs.close()
    finally:
        region.close()


def test_an_answer_is_its_status() -> None:
    with caller() as (made, peer):
        for tag, status in ((FIRST, b"answer"), (SECOND, b"")):
            peer.post(encode(Kind.REPLY, tag, status))
            assert made.transact(b"question") == status
            assert made.endpoint.outstanding == 0
            assert list(peer.take(0.0)) == [encode(Kind.REQUEST, tag, b"question")]


def test_what_comes_before_the_answer_is_handled() -> None:
    client = Serving()
    with caller(client) as (made, peer):
        peer.post(encode(Kind.MESSAGE, 5, b"before"))
        peer.post(encode(Kind.REPLY, FIRST, b"answer"))
        assert made.transact(b"question") == b"answer"
        assert client.bodies == [b"before"]


@pytest.mark.parametrize(("error", "expected"), [(7, TransactionError), (0xFFFF, HandlerFailedError)])
def test_an_error_is_raised(error: int, expected: type[Exception]) -> None:
    with caller() as (made, peer):
        peer.post(encode(Kind.REPLY, FIRST, b"why", error))
        with pytest.raises(expected):
            made.transact(b"question")
        assert made.endpoint.outstanding == 0
        assert made.endpoint.state is State.CONNECTED


@pytest.mark.parametrize("frame", [
    encode(Kind.REPLY, SECOND, b"not outstanding"), encode(Kind.REPLY, FIRST, bytes(Quotas().status_bytes + 1)),
    b"\x05\x01" + encode(Kind.REPLY, FIRST)[2:], encode(Kind.REPLY, FIRST)[:7], b"",
])
def test_what_is_no_answer_ends_the_connection_and_the_outcome_is_unknown(frame: bytes) -> None:
    with caller() as (made, peer):
        peer.post(frame)
        with pytest.raises(OutcomeUnknownError):
            made.transact(b"question")
        assert made.endpoint.state is not State.CONNECTED


def test_what_came_together_is_answered_together() -> None:
    mine, theirs = meeting()
    endpoint, peer = Endpoint(mine, Serving(), Resources()), None
    theirs.look()
    while peer is None:
        endpoint.pump(0.0)
        peer = theirs.connection()
    peer.post(hello(Quotas()))
    endpoint.pump(0.0)
    carrier = endpoint._carrier
    assert carrier is not None
    for together in (1, 8):
        before = carrier.rings.doorbells
        for tag in range(together):
            peer.post(encode(Kind.REQUEST, tag, b"question"))
        endpoint.pump(0.0)
        assert carrier.rings.doorbells - before <= 2, "one for the last answer, one at the end of the turn"
        answers = [encode(Kind.REPLY, tag, b"question") for tag in range(together)]
        assert [frame for frame in peer.take(0.0) if frame[:1] != bytes([Kind.HELLO])] == answers
    endpoint.destroy()
