"""Transactions in one call of the core each, over TCP: what is not so usual is as it is without that."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from idc.endpoint import Client, Endpoint, Resources, blocking, endpoint
from idc.endpoint.blocking import Caller
from idc.endpoint.frames import Kind, Quotas, encode, hello, parse
from idc.endpoint.session import RECEIVED
from idc.errors import OutcomeUnknownError
from idc.transport.tcp import LONG, ListenPort, TcpCarrier

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.endpoint import IncomingTransaction

QUOTAS = Quotas(requests=8, messages=4, parameter_bytes=1 << 20, status_bytes=1 << 20)


class Echo(Client):
    """Answers each with its parameters; or keeps it."""

    def __init__(self) -> None:
        self.keeps = False
        self.kept: list[IncomingTransaction] = []

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        del endpoint
        if self.keeps:
            self.kept.append(transaction)
        else:
            transaction.complete(transaction.parameters)


@contextlib.contextmanager
def quick() -> Iterator[tuple[Caller, Echo, TcpCarrier]]:
    """A caller whose next transaction, of either side, is the core's; and a peer that is played by hand."""
    port, client = ListenPort("127.0.0.1", 0), Echo()
    with Caller(port, Resources(QUOTAS), client) as made:
        peer = TcpCarrier(socket.create_connection(port.address), select.epoll())
        peer.post(hello(QUOTAS))
        peer.flush()
        made.connect(10)
        assert len(peer.take(10)) == 1  # its HELLO
        made.endpoint.pump(0.0)
        try:
            armed(made)
            yield made, client, peer
        finally:
            peer.close()


def armed(made: Caller) -> None:
    assert made.endpoint._line is not None
    assert made._slots.line is not None


def taken(peer: TcpCarrier, count: int) -> list[tuple[int, int, int, bytes]]:
    found: list[tuple[int, int, int, bytes]] = []
    while len(found) < count:
        found += [parse(frame) for frame in peer.take(10)]
    return found


def pumped(made: Caller, peer: TcpCarrier, count: int) -> list[tuple[int, bytes]]:
    """What is answered to so many: tags and statuses."""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        made.endpoint.pump(0.01)
        found += [(tag, body) for _, _, tag, body in (parse(frame) for frame in peer.take(0.0))]
    return found


def test_usual_requests_are_answered_and_leave_nothing_behind() -> None:
    with quick() as (made, _, peer):
        for tag in range(20):
            peer.send(encode(Kind.REQUEST, tag, bytes([tag])))
            assert made.endpoint.pump(10)
            armed(made)
            assert taken(peer, 1) == [(Kind.REPLY, 0, tag, bytes([tag]))]
            assert made.endpoint.status.held == 0


@pytest.mark.parametrize("sizes", [[10] * 8, [10, LONG, 10], [LONG], [LONG - 9, LONG - 8, LONG - 7], [1 << 20, 1]])
def test_several_at_once_and_long_ones_are_answered_too(sizes: list[int]) -> None:
    with quick() as (made, _, peer):
        for tag, size in enumerate(sizes):
            peer.post(encode(Kind.REQUEST, tag, bytes([tag]) * size))
        peer.flush()
        while peer.wire.unsent:
            made.endpoint.pump(0.01)
            peer.flush()
        assert pumped(made, peer, len(sizes)) == [(tag, bytes([tag]) * size) for tag, size in enumerate(sizes)]
        assert made.endpoint.status.held == 0
        armed(made)


def test_what_is_kept_is_answered_later_by_its_own_tag() -> None:
    with quick() as (made, client, peer):
        client.keeps = True
        for tag in (5, 6):
            peer.send(encode(Kind.REQUEST, tag, b"?"))
            assert made.endpoint.pump(10)
        assert made.endpoint.status.held == 2
        for item in reversed(client.kept):
            item.complete(b"late")
        assert pumped(made, peer, 2) == [(6, b"late"), (5, b"late")]
        client.keeps = False
        peer.send(encode(Kind.REQUEST, 7, b"next"))
        assert pumped(made, peer, 1) == [(7, b"next")]
        armed(made)


def answering(peer: TcpCarrier, *sizes: int) -> threading.Thread:
    """A peer that answers one request after the other, by statuses of those lengths."""
    def run() -> None:
        for size in sizes:
            [(_, _, tag, body)] = taken(peer, 1)
            peer.send(encode(Kind.REPLY, tag, body[:1] * size))
            while peer.wire.unsent:
                peer.take(0.01)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_answers_of_all_lengths_are_those_of_their_requests() -> None:
    sizes = (0, 1, 64, LONG - 9, LONG - 8, LONG, 70_000, 5)
    with quick() as (made, _, peer):
        thread = answering(peer, *sizes)
        for at, size in enumerate(sizes):
            assert made.transact(bytes([at]) * (LONG if at == 3 else 7)) == bytes([at]) * size
        thread.join()
        assert made.endpoint.outstanding == 0


def test_a_request_that_comes_before_the_answer_is_handled() -> None:
    with quick() as (made, _, peer):
        def run() -> None:
            [(_, _, tag, _)] = taken(peer, 1)
            peer.post(encode(Kind.REQUEST, 77, b"mine"))
            peer.send(encode(Kind.REPLY, tag, b"yours"))

        thread = threading.Thread(target=run)
        thread.start()
        assert made.transact(b"?") == b"yours"
        thread.join()
        assert pumped(made, peer, 1) == [(77, b"mine")]


@pytest.mark.parametrize("frame", [encode(Kind.REPLY, 0x7777, b""), encode(Kind.REPLY, 0x7777, bytes(LONG)), b"short"])
def test_what_is_no_answer_ends_the_connection_with_a_reason(frame: bytes) -> None:
    with quick() as (made, _, peer):
        def run() -> None:
            taken(peer, 1)
            peer.send(frame)

        thread = threading.Thread(target=run)
        thread.start()
        with pytest.raises(OutcomeUnknownError):
            made.transact(b"?")
        thread.join()
        assert made.endpoint.reason
        assert made.endpoint._line is None


def test_the_end_of_the_connection_ends_what_waits() -> None:
    with quick() as (made, _, peer):
        def run() -> None:
            taken(peer, 1)
            peer.close()

        thread = threading.Thread(target=run)
        thread.start()
        with pytest.raises(OutcomeUnknownError):
            made.transact(b"?")
        thread.join()


class Notes:
    """What an endpoint's trace is asked."""

    def __init__(self) -> None:
        self.kinds: list[int] = []

    def note(self, moment: tuple[int, int, int]) -> None:
        self.kinds.append(moment[1])

    def connected(self, carrier: object) -> None: ...
    def flushed(self) -> None: ...
    def drain(self) -> None: ...
    def state(self, name: str, reason: str) -> None: ...


def test_while_a_trace_is_set_each_frame_is_noted() -> None:
    with quick() as (made, _, peer):
        notes = Notes()
        made.endpoint.trace = notes  # type: ignore[assignment]
        peer.send(encode(Kind.REQUEST, 1, b"a"))
        assert made.endpoint.pump(10)
        assert taken(peer, 1) == [(Kind.REPLY, 0, 1, b"a")]
        thread = answering(peer, 1)
        assert made.transact(b"b") == b"b"
        thread.join()
        assert notes.kinds == [RECEIVED + Kind.REQUEST, Kind.REPLY, Kind.REQUEST, RECEIVED + Kind.REPLY]
        made.endpoint.trace = None
        peer.send(encode(Kind.REQUEST, 2, b"a"))
        assert pumped(made, peer, 1) == [(2, b"a")]
        armed(made)
        assert len(notes.kinds) == 4


@pytest.mark.parametrize("sent", [
    [encode(Kind.REQUEST, 1, b"alone")], [encode(Kind.REQUEST, 1, b"alone"), encode(Kind.MESSAGE, 2, b"beside")]])
def test_what_the_core_took_is_not_lost_when_a_signals_handler_raises(
        sent: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with quick() as (made, _, peer):
        request = endpoint._request

        def raising(*arguments: object) -> int:
            monkeypatch.undo()
            request(*arguments)
            raise KeyboardInterrupt

        for frame in sent:
            peer.post(frame)
        peer.flush()
        monkeypatch.setattr(endpoint, "_request", raising)
        with pytest.raises(KeyboardInterrupt):
            made.endpoint.pump(10)
        found: list[tuple[int, int, int, bytes]] = []
        while len(found) < len(sent):
            made.endpoint.pump(0.01)
            found += [parse(frame) for frame in peer.take(0.0)]
        assert {(kind, tag) for kind, _, tag, _ in found} == {(Kind.REPLY, 1), (Kind.DONE, 2)} or len(sent) == 1
        assert (Kind.REPLY, 0, 1, b"alone") in found


def test_an_error_in_place_of_the_answer_is_not_lost_when_a_signals_handler_raises(
        monkeypatch: pytest.MonkeyPatch) -> None:
    with quick() as (made, _, peer):
        assert made._slots.line is not None
        tag, transact = int(made._slots.line.tag) + 0x10000, blocking._transact

        def raising(*arguments: object) -> int:
            monkeypatch.undo()
            transact(*arguments)
            raise KeyboardInterrupt

        def answer() -> None:
            assert len(taken(peer, 1)) == 1
            peer.send(encode(Kind.REPLY, tag, b"no", 7))

        playing = threading.Thread(target=answer)
        playing.start()
        made._slots.line.patience_ns = 10_000_000_000
        monkeypatch.setattr(blocking, "_transact", raising)
        with pytest.raises(KeyboardInterrupt):
            made.transact(b"question")
        playing.join()
        made.endpoint.pump(0.0)
        assert made.endpoint.outstanding == 0
        armed(made)
