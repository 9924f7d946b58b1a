"""Transactions in one call of the core each, over shared memory: what is not so usual is as it is without that."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from quick_support import armed, next_tag, play, quick

from idc.endpoint import Endpoint, Result, State
from idc.endpoint.frames import HANDLER_FAILED, Kind, Quotas, encode, parse
from idc.errors import HandlerFailedError, MisuseError, OutcomeUnknownError, TooBigError, TransactionError

if TYPE_CHECKING:
    from idc.endpoint import IncomingTransaction
    from idc.endpoint.blocking import Caller
    from idc.transport.shared import SharedCarrier


def ask(made: Caller, peer: SharedCarrier, tag: int, body: bytes = b"question") -> None:
    peer.post(encode(Kind.REQUEST, tag, body))
    assert made.endpoint.pump(0.0)


def answers(peer: SharedCarrier) -> list[tuple[int, int, bytes]]:
    """Tag, error and status of each, and nothing else."""
    found = [parse(frame) for frame in peer.take(0.0)]
    assert all(kind == Kind.REPLY for kind, *_ in found)
    return [(tag, error, body) for _, error, tag, body in found]


# -- requests of the peer


def test_usual_requests_are_answered_and_leave_nothing_behind() -> None:
    with quick() as (made, client, peer):
        seen = []

        def look(endpoint: Endpoint, item: IncomingTransaction) -> None:
            seen.append(endpoint.status.held)
            item.complete(item.parameters[::-1])

        client.does = look
        for tag in range(40):
            ask(made, peer, tag, bytes([tag, 7]))
            armed(made)
            assert made.endpoint.status.held == 0
        assert answers(peer) == [(tag, 0, bytes([7, tag])) for tag in range(40)]
        assert set(seen) == {1}, "while it is handled, it is held"


def test_those_that_are_kept_are_answered_by_their_own_tags_in_any_order() -> None:
    with quick() as (made, client, peer):
        client.does = client.keep
        for tag in (11, 12, 13):
            ask(made, peer, tag)
        assert made.endpoint.status.held == 3
        for item in reversed(client.kept):
            assert item.complete(b"late") is Result.OK
            assert item.completed
        made.endpoint.pump(0.0)
        assert answers(peer) == [(13, 0, b"late"), (12, 0, b"late"), (11, 0, b"late")]
        armed(made)
        for item in client.kept:
            with pytest.raises(MisuseError):
                item.complete()


def test_completing_twice_is_misuse_also_while_another_is_handled() -> None:
    with quick() as (made, client, peer):
        def once(_: Endpoint, item: IncomingTransaction) -> None:
            client.kept.append(item)
            item.complete(b"once")

        client.does = once
        ask(made, peer, 1)

        def again(_: Endpoint, item: IncomingTransaction) -> None:
            with pytest.raises(MisuseError):
                client.kept[0].complete()
            with pytest.raises(MisuseError):
                client.kept[0].fail("no")
            item.complete(b"other")

        client.does = again
        ask(made, peer, 2)
        assert answers(peer) == [(1, 0, b"once"), (2, 0, b"other")]


def test_a_handler_that_raises_or_fails_says_so() -> None:
    with quick() as (made, client, peer):
        def fail(_: Endpoint, item: IncomingTransaction) -> None:
            item.fail("not today")

        def throw(_: Endpoint, item: IncomingTransaction) -> None:
            raise ValueError(item.parameters)

        for tag, does in ((1, fail), (2, throw)):
            client.does = does
            ask(made, peer, tag)
            ask(made, peer, tag + 10)
        found = answers(peer)
        assert [(tag, error) for tag, error, _ in found] == [(tag, HANDLER_FAILED) for tag in (1, 11, 2, 12)]
        assert b"not today" in found[0][2]
        assert b"question" in found[3][2]
        assert made.endpoint.state is State.CONNECTED


def test_what_interrupts_a_handler_leaves_the_transaction_open() -> None:
    with quick() as (made, client, peer):
        def interrupt(_: Endpoint, item: IncomingTransaction) -> None:
            client.kept.append(item)
            raise KeyboardInterrupt

        client.does = interrupt
        with pytest.raises(KeyboardInterrupt):
            ask(made, peer, 5)
        assert made.endpoint.status.held == 1
        assert client.kept[0].complete(b"after all") is Result.OK
        assert answers(peer) == [(5, 0, b"after all")]


def test_statuses_and_errors_are_checked_as_ever() -> None:
    with quick() as (made, client, peer):
        def complete(_: Endpoint, item: IncomingTransaction) -> None:
            for error in (-1, HANDLER_FAILED, 1 << 20):
                with pytest.raises(MisuseError):
                    item.complete(b"", error)
            with pytest.raises(TooBigError):
                item.complete(bytes(Quotas().status_bytes + 1))
            assert not item.completed
            item.complete(bytearray(b"of another kind"), 9)  # type: ignore[arg-type] # which has always worked

        client.does = complete
        ask(made, peer, 1)
        client.does = lambda _, item: item.complete(b"code", 65534)
        made.endpoint.pump(0.0)
        ask(made, peer, 2)
        client.does = lambda _, item: item.complete(bytes(Quotas().status_bytes))
        ask(made, peer, 3)
        assert answers(peer) == [(1, 9, b"of another kind"), (2, 65534, b"code"), (3, 0, bytes(Quotas().status_bytes))]


def test_a_handler_may_drive_the_endpoint_and_call() -> None:
    with quick() as (made, client, peer):
        def nested(endpoint: Endpoint, item: IncomingTransaction) -> None:
            client.does = lambda _, inner: inner.complete(b"inner")
            peer.post(encode(Kind.REQUEST, 2, b"within"))
            assert endpoint.pump(0.0)
            peer.post(encode(Kind.REPLY, next_tag(made) if made._slots.line is not None else 0x20001, b"answer"))
            assert made.transact(b"question") == b"answer"
            item.complete(b"outer")

        client.does = nested
        ask(made, peer, 1)
        found = [parse(frame) for frame in peer.take(0.0)]
        assert [(kind, body) for kind, _, _, body in found] == [
            (Kind.REPLY, b"inner"), (Kind.REQUEST, b"question"), (Kind.REPLY, b"outer")]
        assert [found[0][2], found[2][2]] == [2, 1]


@pytest.mark.parametrize("end", ["disconnect", "destroy"])
def test_a_connection_that_is_ended_by_its_handler_waits_for_it(end: str) -> None:
    with quick() as (made, client, peer):
        def leave(endpoint: Endpoint, item: IncomingTransaction) -> None:
            client.kept.append(item)
            getattr(endpoint, end)()

        client.does = leave
        ask(made, peer, 1)
        before = made.endpoint.state
        assert before in (State.DISCONNECTING, State.DESTROYING)
        assert made.endpoint.status.held == 1
        assert client.kept[0].complete(b"too late") is Result.CLOSED
        assert made.endpoint.state not in (State.CONNECTED, before)


@pytest.mark.parametrize(("frames", "reason"), [
    ([encode(Kind.REQUEST, 1, b"kept"), encode(Kind.REQUEST, 1, b"again")], "used for two"),
    ([encode(Kind.REQUEST, 1, bytes(Quotas().parameter_bytes + 1))], "are accepted"),
    ([b"\x04\x01" + encode(Kind.REQUEST, 1)[2:]], "flags"),
    ([encode(Kind.REQUEST, 1)[:7]], "header"),
    ([encode(Kind.REPLY, 1)], "not outstanding"),
    ([encode(Kind.REQUEST, tag) for tag in range(Quotas().requests + 1)], "at a time"),
])
def test_the_session_is_the_judge(frames: list[bytes], reason: str) -> None:
    with quick() as (made, client, peer):
        client.does = client.keep
        for frame in frames:
            peer.post(frame)
            made.endpoint.pump(0.0)
        assert made.endpoint.state is not State.CONNECTED
        assert reason in made.endpoint.reason
        for item in client.kept:
            assert item.complete() is Result.CLOSED


def test_what_comes_together_is_in_order_and_the_core_has_its_turn_again() -> None:
    with quick() as (made, client, peer):
        for tag in range(5):
            peer.post(encode(Kind.REQUEST, tag, bytes([tag])))
        peer.post(encode(Kind.MESSAGE, 9, b"beside"))
        made.endpoint.pump(0.0)
        assert client.bodies == [b"beside"]
        found = [parse(frame) for frame in peer.take(0.0)]
        assert [body for kind, _, _, body in found if kind == Kind.REPLY] == [bytes([tag]) for tag in range(5)]
        armed(made)


# -- this side's transactions


def test_usual_transactions_are_counted_and_timed() -> None:
    with quick() as (made, _, peer):
        for _ in range(32):
            peer.post(encode(Kind.REPLY, next_tag(made), b"answer"))
            assert made.transact(b"question") == b"answer"
            assert made.endpoint.outstanding == 0
            armed(made)
        assert len({parse(frame)[2] for frame in peer.take(0.0)}) == 32, "no tag is used twice"
        assert peer.capacity
        carrier = made.endpoint._carrier
        assert carrier is not None
        assert carrier.trips is not None
        assert carrier.trips.struct.samples == 4


@pytest.mark.parametrize("frame", [
    encode(Kind.REPLY, 0, bytes(Quotas().status_bytes + 1)), b"\x05\x01" + encode(Kind.REPLY, 0)[2:],
    encode(Kind.REPLY, 0)[:7], b"",
])
def test_what_is_no_answer_makes_the_outcome_unknown(frame: bytes) -> None:
    with quick() as (made, _, peer):
        peer.post(frame[:4] + next_tag(made).to_bytes(4, "little")[:max(len(frame) - 4, 0)] + frame[8:])
        with pytest.raises(OutcomeUnknownError):
            made.transact(b"question")
        assert made.endpoint.state is not State.CONNECTED
        assert made.endpoint.outstanding == 0


@pytest.mark.parametrize(("error", "expected"), [(7, TransactionError), (HANDLER_FAILED, HandlerFailedError)])
def test_errors_and_what_comes_before_an_answer(error: int, expected: type[Exception]) -> None:
    with quick() as (made, client, peer):
        peer.post(encode(Kind.REQUEST, 3, b"of the peer"))
        peer.post(encode(Kind.MESSAGE, 4, b"before"))
        peer.post(encode(Kind.REPLY, next_tag(made), b"why", error))
        with pytest.raises(expected):
            made.transact(b"question")
        assert client.bodies == [b"before"]
        assert made.endpoint.outstanding == 0
        armed(made)


def test_too_much_is_refused_and_other_memory_taken() -> None:
    with quick() as (made, _, peer):
        with pytest.raises(TooBigError):
            made.transact(bytes(Quotas().parameter_bytes + 1))
        assert peer.take(0.0) == ()
        peer.post(encode(Kind.REPLY, next_tag(made) if made._slots.line is not None else 0x10000, b"answer"))
        assert made.transact(bytearray(b"question")) == b"answer"  # type: ignore[arg-type] # which has always worked
        assert parse(peer.take(0.0)[0])[3] == b"question"


def test_a_peer_that_is_gone_is_no_answer() -> None:
    with quick() as (made, _, peer):
        peer.close()
        with pytest.raises(OutcomeUnknownError):
            made.transact(b"question")
        assert made.endpoint.outstanding == 0


def test_an_interrupted_call_is_outstanding_and_its_answer_is_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    from idc.endpoint import blocking

    def interrupted(*arguments: object) -> int:
        transact(*arguments)
        raise KeyboardInterrupt

    with quick() as (made, _, peer):
        tag, transact = next_tag(made), blocking._transact
        assert made._slots.line is not None
        made._slots.line.patience_ns = 1
        monkeypatch.setattr(blocking, "_transact", interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.transact(b"question")
        monkeypatch.undo()
        assert made.endpoint.outstanding == 1
        peer.post(encode(Kind.REPLY, 0x20001, b"of the second", 7))
        with pytest.raises(TransactionError):
            made.transact(b"again")
        assert made.endpoint.outstanding == 1
        peer.post(encode(Kind.REPLY, tag, b"of the first"))
        peer.post(encode(Kind.REPLY, 0x30002, b"of the third"))
        assert made.transact(b"once more") == b"of the third"
        assert made.endpoint.outstanding == 0


def test_an_answer_that_is_late_is_waited_for() -> None:
    with quick() as (made, _, peer):
        playing = play(peer, {b"late": 0.25, b"soon": 0.0}, 2)
        assert made.transact(b"late") == b"late!"
        assert made.transact(b"soon") == b"soon!"
        playing.join()
        assert made.endpoint.outstanding == 0


def test_a_second_thread_waits_until_the_first_is_out_of_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    from idc.endpoint import blocking

    inside, outside = threading.Event(), threading.Event()
    transact = blocking._transact

    def hold(*arguments: object) -> int:
        inside.set()
        result: int = transact(*arguments)
        time.sleep(0.2)  # it has its answer, and is not out
        outside.set()
        return result

    with quick() as (made, _, peer):
        found: list[bytes] = []

        def call() -> None:
            made.endpoint.pump(0.0)
            found.append(made.transact(b"first", timeout=30))  # it is the first, and the only one, from here on
            made.endpoint.pump(0.0)
            armed(made)
            monkeypatch.setattr(blocking, "_transact", hold)
            found.append(made.transact(b"late"))

        made._first = made._only = 0
        playing, first = play(peer, {b"first": 0.0, b"late": 0.1, b"soon": 0.0}, 3), threading.Thread(target=call)
        first.start()
        assert inside.wait(30)
        assert made._calling
        answer = made.transact(b"soon")
        assert outside.is_set(), "the second was inside the endpoint beside the first"
        first.join()
        playing.join()
        assert [*found, answer] == [b"first!", b"late!", b"soon!"]
        assert made._only == 0
        assert made.endpoint.outstanding == 0


def test_a_signals_handler_may_call_while_a_call_is_under_way() -> None:
    with quick() as (made, _, peer):
        inner: list[bytes] = []
        playing = play(peer, {b"outer": 0.3, b"inner": 0.0}, 2)
        before = signal.signal(signal.SIGALRM, lambda *_: inner.append(made.transact(b"inner")))
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.03)
            assert made.transact(b"outer") == b"outer!"
        finally:
            signal.signal(signal.SIGALRM, before)
        playing.join()
        assert inner == [b"inner!"]
        assert made.endpoint.outstanding == 0
