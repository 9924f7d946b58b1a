"""Transactions in one call of the core each, when something comes between: signals, handlers, another endpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest
from quick_support import armed, next_tag, play, quick

from idc.endpoint import Endpoint, Resources, State, blocking, session
from idc.endpoint import endpoint as endpoints
from idc.endpoint.frames import Kind, Quotas, encode, parse
from idc.errors import ClosedError, MisuseError, TransactionError
from idc.transport import shared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.endpoint import Endpoint, IncomingTransaction
    from idc.endpoint.blocking import Caller

SOON = 1000  # ns: a call of the core that waits no longer


class Stop(Exception):
    """What a signal's handler raises."""


def stop() -> None:
    raise Stop


@contextlib.contextmanager
def at_the_end(module: object, name: str, does: Callable[[], object]) -> Iterator[None]:
    """`does` runs at the end of the next call of that function of the core, before its result is known.

    So does the handler of a signal that came meanwhile.
    """
    function = getattr(module, name)

    def called(*arguments: object) -> object:
        setattr(module, name, function)
        result = function(*arguments)
        does()
        return result

    setattr(module, name, called)
    try:
        yield
    finally:
        setattr(module, name, function)


def frames(peer: object) -> list[tuple[int, int, int, bytes]]:
    return [parse(frame) for frame in peer.take(0.0)]  # type: ignore[attr-defined]


def impatient(made: Caller) -> None:
    assert made._slots.line is not None
    made._slots.line.patience_ns = SOON


# -- whose line it is


def test_a_closed_caller_does_not_send_by_whoever_has_its_resources_now() -> None:
    resources = Resources()
    with quick(resources) as (one, _, peer):
        peer.post(encode(Kind.REPLY, next_tag(one), b"of the first"))
        assert one.transact(b"to the first") == b"of the first"
    with quick(resources) as (two, _, peer):
        with pytest.raises(ClosedError):
            one.transact(b"secret for the first")
        assert peer.take(0.0) == ()
        armed(two)
        impatient(two)
        playing = play(peer, {b"to the second": 0.05}, 1)
        assert two.transact(b"to the second") == b"to the second!"
        playing.join()
        assert two.endpoint.outstanding == 0


# -- order and quotas


def test_a_request_that_the_core_holds_counts_when_its_handler_drives_the_endpoint() -> None:
    with quick(Resources(Quotas(requests=1))) as (made, client, peer):
        seen = []

        def first(endpoint: Endpoint, item: IncomingTransaction) -> None:
            seen.append(item.parameters)
            if item.parameters == b"first":
                endpoint.submit_message(b"between", notify=False)
                peer.post(encode(Kind.REQUEST, 1, b"second"))
                endpoint.pump(0.0)
            item.complete()

        client.does = first
        peer.post(encode(Kind.REQUEST, 1, b"first"))
        made.endpoint.pump(0.0)
        assert seen == [b"first"]
        assert "more than 1 transactions" in made.endpoint.reason


def test_an_answer_does_not_overtake_what_came_before_it() -> None:
    with quick() as (made, client, peer):
        seen: list[bytes] = []

        def ask(_: Endpoint, item: IncomingTransaction) -> None:
            seen.append(made.transact(b"now?"))
            item.complete()

        client.does = ask
        client.bodies = seen
        peer.post(encode(Kind.REQUEST, 1, b"go"))
        peer.post(encode(Kind.MESSAGE, 2, b"old event"))
        playing = _only_requests(peer, b"new state")
        made.endpoint.pump(0.0)
        playing.join()
        assert seen == [b"old event", b"new state"]


def _only_requests(peer: object, answer: bytes) -> threading.Thread:
    def run() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for frame in peer.take(0.01):  # type: ignore[attr-defined]
                kind, _, tag, _ = parse(frame)
                if kind == Kind.REQUEST:
                    peer.send(encode(Kind.REPLY, tag, answer))  # type: ignore[attr-defined]
                    return

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("slots", [1, 4])
def test_a_signals_handler_calls_within_the_quota_of_the_peer(slots: int) -> None:
    with quick(Resources(requests=slots), Quotas(requests=1)) as (made, _, peer):
        inner: list[bytes] = []
        most, due = 0, []

        def run() -> None:
            nonlocal most
            left, end = 2, time.monotonic() + 30
            while left and time.monotonic() < end:
                for frame in peer.take(0.005):
                    _, _, tag, body = parse(frame)
                    due.append((time.monotonic() + 0.1, tag, body))
                    most = max(most, len(due))
                for item in [item for item in due if item[0] <= time.monotonic()]:
                    due.remove(item)
                    peer.send(encode(Kind.REPLY, item[1], item[2] + b"!"))
                    left -= 1

        playing = threading.Thread(target=run)
        impatient(made)
        playing.start()
        with at_the_end(blocking, "_transact", lambda: inner.append(made.transact(b"inner"))):
            assert made.transact(b"outer") == b"outer!"
        playing.join()
        assert inner == [b"inner!"]
        assert most == 1
        assert made.endpoint.outstanding == 0


# -- a signal's handler that calls, or drives the endpoint


def test_a_handlers_calls_have_their_own_answers_and_leave_the_outer_one_its_own() -> None:
    with quick() as (made, _, peer):
        inner: list[bytes] = []

        def twice() -> None:
            inner.extend((made.transact(b"inner 1"), made.transact(b"inner 2")))

        impatient(made)
        playing = play(peer, {b"outer": 0.05, b"inner 1": 0.1, b"inner 2": 0.15}, 3)
        with at_the_end(blocking, "_transact", twice):
            assert made.transact(b"outer") == b"outer!"
        playing.join()
        assert inner == [b"inner 1!", b"inner 2!"]
        assert made.endpoint.outstanding == 0


def test_an_answer_that_came_is_not_overwritten_by_a_handlers_call() -> None:
    with quick() as (made, _, peer):
        inner: list[bytes] = []
        playing = play(peer, {b"outer": 0.0, b"inner": 0.0}, 2)
        with at_the_end(blocking, "_transact", lambda: inner.append(made.transact(b"inner"))):
            assert made.transact(b"outer") == b"outer!"
        playing.join()
        assert inner == [b"inner!"]
        assert made.endpoint.outstanding == 0


def test_a_handler_that_drives_the_endpoint_deals_with_what_the_core_has() -> None:
    with quick() as (made, client, peer):
        seen: list[bytes] = []

        def see(_: Endpoint, item: IncomingTransaction) -> None:
            seen.append(item.parameters)
            item.complete(item.parameters)

        client.does = see
        peer.post(encode(Kind.REQUEST, 1, b"once"))
        with at_the_end(endpoints, "_request", lambda: made.endpoint.pump(0.0)):
            assert made.endpoint.pump(0.0)
        peer.post(encode(Kind.MESSAGE, 2, b"message"))
        with at_the_end(endpoints, "_request", lambda: made.endpoint.pump(0.0)):
            made.endpoint.pump(0.0)
        assert seen == [b"once"]
        assert client.bodies == [b"message"]
        assert [kind for kind, *_ in frames(peer)] == [Kind.REPLY, Kind.DONE]
        assert made.endpoint.state is State.CONNECTED


def test_what_came_in_place_of_an_answer_is_before_what_a_handler_finds() -> None:
    with quick() as (made, client, peer):
        tag = next_tag(made)
        peer.post(encode(Kind.MESSAGE, 1, b"first"))
        peer.post(encode(Kind.MESSAGE, 2, b"second"))
        peer.post(encode(Kind.REPLY, tag, b"answer"))
        with at_the_end(blocking, "_transact", lambda: made.endpoint.pump(0.0)):
            assert made.transact(b"question") == b"answer"
        assert client.bodies == [b"first", b"second"]
        assert made.endpoint.outstanding == 0


def test_the_time_of_what_has_completed_meanwhile_is_not_kept() -> None:
    with quick() as (made, _, peer):
        assert made._slots.line is not None
        made._slots.line.tag += 7 << 16  # the next one is timed
        impatient(made)
        tag = next_tag(made)

        def late() -> None:
            peer.post(encode(Kind.REPLY, tag, b"late"))
            made._slots.unquicken()
            made.endpoint.pump(0.0)

        with at_the_end(blocking, "_transact", late):
            assert made.transact(b"question") == b"late"
        assert made.endpoint._session is not None
        assert made.endpoint._session._begun == {}


# -- a signal's handler that raises


def test_a_call_that_is_interrupted_before_it_goes_on_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with quick() as (made, _, peer):
        impatient(made)
        unanswered = made.endpoint.unanswered
        monkeypatch.setattr(made.endpoint, "unanswered", stop)
        with pytest.raises(Stop):
            made.transact(b"first")
        monkeypatch.setattr(made.endpoint, "unanswered", unanswered)
        assert not made._calling
        assert made.endpoint.outstanding == 1
        tag = frames(peer)[0][2]
        playing = play(peer, {b"second": 0.0, b"third": 0.1}, 2)
        assert made.transact(b"second") == b"second!"
        peer.send(encode(Kind.REPLY, tag, b"of the first"))
        made.endpoint.pump(1)
        armed(made)
        impatient(made)
        assert made.transact(b"third") == b"third!"
        playing.join()
        assert made.endpoint.outstanding == 0


def test_a_call_that_is_interrupted_in_the_lock_lets_others_go_on() -> None:
    class Lock:
        def __enter__(self) -> None:
            made._lock = lock
            raise Stop

        def __exit__(self, *_: object) -> None:
            pass

    with quick() as (made, _, peer):
        impatient(made)
        lock, found = made._lock, []
        made._lock = Lock()  # type: ignore[assignment]
        with pytest.raises(Stop):
            made.transact(b"first")
        assert not made._calling
        playing = play(peer, {b"first": 0.0, b"other": 0.0}, 2)
        thread = threading.Thread(target=lambda: found.append(made.transact(b"other", timeout=30)))
        thread.start()
        thread.join()
        playing.join()
        assert found == [b"other!"]


def test_what_an_interrupted_exchange_has_sent_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "NAP_ALONE", 0.001)
    with quick() as (made, _, peer):
        made._slots.unquicken()  # as for the first call of a connection
        with at_the_end(shared, "_call", stop), pytest.raises(Stop):
            made.transact(b"one")
        assert made.endpoint.outstanding == 1
        peer.send(encode(Kind.REPLY, frames(peer)[0][2], b"late"))
        made.endpoint.pump(1)
        armed(made)
        assert made._slots.line is not None
        assert not made._slots.line.posted
        playing = play(peer, {b"two": 0.0}, 1)
        assert made.transact(b"two") == b"two!"
        playing.join()
        assert made.endpoint.outstanding == 0


def test_requests_and_frames_that_the_core_took_are_not_lost() -> None:
    with quick() as (made, client, peer):
        for sent in ([encode(Kind.REQUEST, 7, b"alone")],
                     [encode(Kind.MESSAGE, 1, b"one"), encode(Kind.REQUEST, 8, b"beside"),
                      encode(Kind.MESSAGE, 2, b"two")]):
            for frame in sent:
                peer.post(frame)
            armed(made)
            with at_the_end(endpoints, "_request", stop), pytest.raises(Stop):
                made.endpoint.pump(0.0)
            assert made.endpoint.pump(0.0)
        assert client.bodies == [b"one", b"two"]
        found = frames(peer)
        assert [(tag, body) for kind, _, tag, body in found if kind == Kind.REPLY] == [(7, b"alone"), (8, b"beside")]
        assert made.endpoint.status.held == 0


def test_an_error_in_place_of_the_answer_is_not_lost() -> None:
    with quick() as (made, _, peer):
        for name, module in (("_transact", blocking), ("_call", shared)):
            if name == "_call":
                made._slots.unquicken()
            tag = next_tag(made) if name == "_transact" else 0x20001
            peer.post(encode(Kind.REPLY, tag, b"no", 7))
            with at_the_end(module, name, stop), pytest.raises(Stop):
                made.transact(b"question")
            assert made.endpoint.pump(0.0)
            assert made.endpoint.outstanding == 0
            assert made.endpoint.state is State.CONNECTED
        peer.post(encode(Kind.REPLY, next_tag(made), b"no", 9))
        with pytest.raises(TransactionError):
            made.transact(b"another")


def test_an_answer_that_came_and_was_not_seen_leaves_nothing() -> None:
    with quick() as (made, _, peer):
        peer.post(encode(Kind.REPLY, next_tag(made), b"unseen"))
        with at_the_end(blocking, "_transact", stop), pytest.raises(Stop):
            made.transact(b"question")
        assert made.endpoint.outstanding == 0
        assert len(frames(peer)) == 1
        playing = play(peer, {b"again": 0.0}, 1)
        assert made.transact(b"again") == b"again!"
        playing.join()
        assert made.endpoint.outstanding == 0


@pytest.mark.parametrize("error", [Stop, TypeError, KeyboardInterrupt])
def test_a_request_whose_answer_went_is_complete_whatever_raises_then(error: type[BaseException]) -> None:
    with quick() as (made, client, peer):
        def complete(_: Endpoint, item: IncomingTransaction) -> None:
            client.kept.append(item)
            item.complete(b"answer")

        client.does = complete

        def throw() -> None:
            raise error

        peer.post(encode(Kind.REQUEST, 3, b"question"))
        expected = pytest.raises(error) if error is KeyboardInterrupt else contextlib.nullcontext()
        with at_the_end(session, "_answer", throw), expected:
            made.endpoint.pump(0.0)
        assert client.kept[0].completed
        assert made.endpoint.status.held == 0
        assert [(kind, tag, body) for kind, _, tag, body in frames(peer)] == [(Kind.REPLY, 3, b"answer")]
        peer.post(encode(Kind.REQUEST, 4, b"question"))
        made.endpoint.pump(0.0)
        assert client.kept[1].completed
        with pytest.raises(MisuseError):
            client.kept[0].complete()


def test_a_pump_that_is_interrupted_waits_for_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with quick() as (made, _, _):
        waits: list[float] = []

        def turn(timeout: float) -> bool:
            waits.append(timeout)
            return False

        monkeypatch.setattr(made.endpoint, "_turn", turn)
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            made.endpoint.pump(30)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert len(waits) == 1
        assert waits[0] <= 29.96
