"""`Caller.transact` where it goes in few steps: what is not just the answer goes the usual way, and nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from idc.endpoint.blocking import Caller
from idc.endpoint.endpoint import Client, Resources
from idc.endpoint.frames import HANDLER_FAILED, Kind, Quotas, bye, encode, hello
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Result
from idc.errors import HandlerFailedError, OutcomeUnknownError, TooBigError, TransactionError
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc.endpoint.endpoint import Endpoint
    from idc.endpoint.session import IncomingMessage
    from idc.transport.base import Frame
    from idc.transport.local import LocalCarrier

#: Of the first transaction of an endpoint, and of the one after it.
FIRST, SECOND = 0x10000, 0x20001


class Noting(Client):
    """Keeps what came."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.bodies.append(message.body)
        message.complete()


def caller(client: Client | None = None, requests: int | None = None) -> tuple[Caller, LocalCarrier]:
    mine, theirs = meeting()
    made = Caller(mine, Resources() if requests is None else Resources(requests=requests), client)
    theirs.look()
    peer = None
    while peer is None:
        made.endpoint.pump(0.0)
        peer = theirs.connection()
    peer.post(hello(Quotas()))
    made.connect(10)
    assert len(peer.take(0.0)) == 1  # its HELLO
    return made, peer


def test_an_answer_is_its_status_and_the_slot_is_free_again() -> None:
    made, peer = caller()
    for tag in (FIRST, SECOND):
        peer.post(encode(Kind.REPLY, tag, b"answer"))
        assert made.transact(b"question") == b"answer"
        assert made.endpoint.outstanding == 0
        assert list(peer.take(0.0)) == [encode(Kind.REQUEST, tag, b"question")]
    made.close()


def test_what_comes_with_the_answer_is_handled() -> None:
    client = Noting()
    made, peer = caller(client)
    for frame in (encode(Kind.MESSAGE, 5, b"before"), encode(Kind.REPLY, FIRST, b"answer"),
                  encode(Kind.MESSAGE, 6, b"after")):
        peer.post(frame)
    assert made.transact(b"question") == b"answer"
    assert client.bodies == [b"before", b"after"]
    assert list(peer.take(0.0)) == [encode(Kind.REQUEST, FIRST, b"question"), encode(Kind.DONE, 5),
                                    encode(Kind.DONE, 6)]
    made.close()


def test_what_comes_before_the_answer_is_handled() -> None:
    client = Noting()
    made, peer = caller(client)
    peer.post(encode(Kind.MESSAGE, 5, b"before"))

    class Answering(list[bytes]):
        """So that the answer comes once the message was handled."""

        def append(self, body: bytes) -> None:
            super().append(body)
            peer.post(encode(Kind.REPLY, FIRST, b"answer"))

    client.bodies = Answering()
    assert made.transact(b"question") == b"answer"
    assert client.bodies == [b"before"]
    made.close()


@pytest.mark.parametrize(("error", "expected"), [(7, TransactionError), (HANDLER_FAILED, HandlerFailedError)])
def test_an_error_is_raised(error: int, expected: type[Exception]) -> None:
    made, peer = caller()
    peer.post(encode(Kind.REPLY, FIRST, b"why", error))
    with pytest.raises(expected):
        made.transact(b"question")
    assert made.endpoint.outstanding == 0
    assert made.endpoint.state is State.CONNECTED
    made.close()


@pytest.mark.parametrize("frame", [
    encode(Kind.REPLY, SECOND, b"not outstanding"), encode(Kind.REPLY, FIRST, bytes(Quotas().status_bytes + 1)),
    b"\x05\x01" + encode(Kind.REPLY, FIRST)[2:], bye("enough"), b"",
])
def test_what_is_no_answer_ends_the_connection_and_the_outcome_is_unknown(frame: bytes) -> None:
    made, peer = caller()
    peer.post(frame)
    with pytest.raises(OutcomeUnknownError):
        made.transact(b"question")
    assert made.endpoint.state is not State.CONNECTED
    made.close()


def test_too_long_is_refused() -> None:
    made, peer = caller()
    with pytest.raises(TooBigError):
        made.transact(bytes(Quotas().parameter_bytes + 1))
    assert made.endpoint.outstanding == 0
    assert not peer.take(0.0)
    made.close()


def test_a_slot_that_kept_an_answer_for_its_turn_serves_a_call() -> None:
    """Ordered answers stay in their slot until it is their turn: nothing of that may be left for the next use."""
    client = Noting()
    made, peer = caller(client, requests=1)
    statuses: list[bytes] = []
    made.endpoint.submit_transaction(b"in order", lambda completion: statuses.append(completion.status), ordered=True)
    peer.post(encode(Kind.REPLY, FIRST, b"first"))
    made.endpoint.pump(0.0)
    peer.post(encode(Kind.MESSAGE, 5, b"before"))  # so that the answer is not what comes next
    peer.post(encode(Kind.REPLY, 0x20000, b"second"))
    assert made.transact(b"question") == b"second"
    assert (statuses, client.bodies) == ([b"first"], [b"before"])
    made.close()


def test_what_was_posted_before_a_call_that_has_no_slot_is_announced() -> None:
    made, peer = caller(requests=1)
    made.endpoint.submit_transaction(b"holds the slot")
    peer.take(0.0)
    rung = made.endpoint._carrier
    assert rung is not None
    made.endpoint.submit_message(b"quiet", notify=False)
    before = rung.rings.doorbells
    assert made.endpoint.call(b"question", lambda _: None, 0.0) is Result.BACK_PRESSURED
    assert rung.rings.doorbells == before + 1
    made.close()


def test_an_interrupted_call_leaves_its_answer_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    made, peer = caller()
    carrier = made.endpoint._carrier
    assert carrier is not None
    usual = carrier.exchange

    def interrupted(frame: bytes, body: bytes, timeout: float) -> Sequence[Frame]:
        usual(frame, body, 0.0)
        monkeypatch.setattr(carrier, "posted", True, raising=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(carrier, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.transact(b"first")
    assert made.endpoint.outstanding == 1, "it went, and may be answered"
    monkeypatch.setattr(carrier, "exchange", usual)
    peer.post(encode(Kind.REPLY, FIRST, b"of the first"))
    peer.post(encode(Kind.REPLY, SECOND, b"of the second"))
    assert made.transact(b"second") == b"of the second"
    assert made.endpoint.outstanding == 0
    made.close()


def test_a_call_that_is_interrupted_before_it_went_holds_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = caller()
    carrier = made.endpoint._carrier
    assert carrier is not None

    def interrupted(frame: bytes, body: bytes, timeout: float) -> Sequence[Frame]:
        raise KeyboardInterrupt

    monkeypatch.setattr(carrier, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.transact(b"question")
    assert made.endpoint.outstanding == 0
    made.close()
