"""One connection against a peer that means ill, and against a model of what is outstanding."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idc.endpoint import frames
from idc.endpoint.frames import Kind, Quotas
from idc.endpoint.results import Completion, Result
from idc.endpoint.session import IncomingMessage, IncomingTransaction, Session, Slots
from idc.errors import DisconnectedError, MisuseError, PeerGoneError, ProtocolError, TooBigError

if TYPE_CHECKING:
    from collections.abc import Callable

QUOTAS = Quotas(requests=2, messages=2, parameter_bytes=16, status_bytes=8)


def make(sent: list[bytes] | None = None, accepts: Quotas = QUOTAS, peer: Quotas | None = QUOTAS) -> Session:
    session = Session(accepts, Slots(4), Slots(4), (sent if sent is not None else []).append)
    if peer is not None:
        assert session.receive(frames.hello(peer)) == []
    return session


def tag_of(frame: bytes) -> int:
    return frames.parse(frame)[2]


@pytest.mark.parametrize(("frame", "reason"), [
    (b"", "header alone"),
    (b"\4\1\0\0\0\0\0\0", "flags"),
    (frames.encode(Kind.REPLY, 0), "not outstanding"),
    (frames.encode(Kind.REPLY, 0xFFFF_FFFF), "not outstanding"),
    (frames.encode(Kind.DONE, 1 << 16), "not outstanding"),
    (frames.encode(Kind.REQUEST, 0, bytes(17)), "17 bytes sent, 16 are accepted"),
    (frames.encode(Kind.MESSAGE, 0, bytes(17)), "17 bytes sent, 16 are accepted"),
    (frames.encode(Kind.REPLY, 0, bytes(9)), "a status of 9 bytes"),
    (frames.encode(Kind.DONE, 0, b"x"), "with the completion"),
    (frames.hello(QUOTAS), "second HELLO"),
    (b"\x63" + bytes(7), "unknown kind 99"),
])  # fmt: skip
def test_a_broken_rule_is_named(frame: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        make().receive(frame)


@pytest.mark.parametrize("body", [b"", b"\2\0" + bytes(17), b"\2\0" + bytes(19), b"\1\0" + bytes(18),
                                  b"\2\0" + b"\xff" * 18])
def test_a_bad_hello_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match=r"HELLO|version"):
        make(peer=None).receive(frames.encode(Kind.HELLO, body=body))


def test_nothing_comes_before_hello() -> None:
    with pytest.raises(ProtocolError, match="before HELLO"):
        make(peer=None).receive(frames.encode(Kind.REQUEST, 0))


def test_bye_says_why_and_is_fit_to_print() -> None:
    with pytest.raises(PeerGoneError, match=r"tired \?\[31m"):
        make().receive(frames.bye("tired \x1b[31m"))


@pytest.mark.parametrize("kind", [Kind.REQUEST, Kind.MESSAGE])
def test_a_peer_beyond_its_quota_or_with_one_tag_twice_is_refused(kind: Kind) -> None:
    session = make()
    session.receive(frames.encode(kind, 1))
    with pytest.raises(ProtocolError, match="tag 0x1 is used for two"):
        session.receive(frames.encode(kind, 1))
    session.receive(frames.encode(kind, 2))
    with pytest.raises(ProtocolError, match="more than 2"):
        session.receive(frames.encode(kind, 3))


def test_an_answer_to_a_former_use_of_a_slot_is_refused() -> None:
    sent: list[bytes] = []
    session = Session(QUOTAS, Slots(1), Slots(1), sent.append)
    session.receive(frames.hello(QUOTAS))
    assert session.submit_transaction(b"a", None, ordered=False) is Result.OK
    session.receive(frames.encode(Kind.REPLY, tag_of(sent[-1])))
    first = tag_of(sent[-1])
    assert session.submit_transaction(b"b", None, ordered=False) is Result.OK
    assert tag_of(sent[-1]) != first
    with pytest.raises(ProtocolError, match="not outstanding"):
        session.receive(frames.encode(Kind.REPLY, first))


@pytest.mark.parametrize("ordered", [False, True])
def test_a_slot_serves_beyond_the_uses_that_its_tag_can_count(ordered: bool) -> None:
    """65,536 uses make the count 0 again: such a tag is answered, and fails, like any other."""
    sent: list[bytes] = []
    slots = Slots(1)
    for last in ("answered", "lost"):
        session = Session(QUOTAS, slots, Slots(1), sent.append)
        session.receive(frames.hello(QUOTAS))
        while not sent or tag_of(sent[-1]) != 0xFFFF_0000:
            assert session.submit_transaction(b"", None, ordered=ordered) is Result.OK
            assert session.receive(frames.encode(Kind.REPLY, tag_of(sent[-1]))) == [(None, Completion(Result.OK))]
        assert session.submit_transaction(b"", None, ordered=ordered) is Result.OK
        assert tag_of(sent[-1]) == 0
        if last == "answered":
            session.receive(frames.encode(Kind.REPLY, 0))
            with pytest.raises(ProtocolError, match="not outstanding"):
                session.receive(frames.encode(Kind.REPLY, 0))
        else:
            assert [c.result for _, c in session.end("lost")] == [Result.OUTCOME_UNKNOWN]
        assert slots.outstanding == 0


def test_an_ordered_answer_cannot_come_twice() -> None:
    sent: list[bytes] = []
    session = make(sent)
    for _ in range(2):
        session.submit_transaction(b"", None, ordered=True)
    assert session.receive(frames.encode(Kind.REPLY, tag_of(sent[1]))) == []  # waits for its turn
    with pytest.raises(ProtocolError, match="not outstanding"):
        session.receive(frames.encode(Kind.REPLY, tag_of(sent[1])))


@settings(max_examples=500)
@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_bytes_end_in_an_event_or_a_reason(noise: list[bytes]) -> None:
    session = make()
    session.submit_transaction(b"", None, ordered=False)
    for frame in noise:
        try:
            session.receive(frame)
        except DisconnectedError:
            return
    assert session.held <= QUOTAS.requests + QUOTAS.messages


def test_misuse_is_the_callers() -> None:
    session = make()
    with pytest.raises(TooBigError):
        session.submit_message(bytes(17), None)
    event = session.receive(frames.encode(Kind.REQUEST, 5))
    assert isinstance(event, IncomingTransaction)
    with pytest.raises(MisuseError, match="error code"):
        event.complete(error=65535)
    with pytest.raises(TooBigError):
        event.complete(bytes(9))
    assert event.complete(bytes(8)) is Result.OK
    with pytest.raises(MisuseError, match="before"):
        event.complete()
    with pytest.raises(MisuseError, match="before"):
        event.fail("late")


def test_what_could_not_be_posted_is_not_outstanding() -> None:
    def broken(frame: bytes) -> None:
        raise PeerGoneError("gone")

    slots = Slots(2)
    session = Session(QUOTAS, slots, Slots(1), broken)
    session.receive(frames.hello(QUOTAS))
    for ordered in (False, True):
        with pytest.raises(PeerGoneError):
            session.submit_transaction(b"", None, ordered=ordered)
        assert slots.outstanding == 0
    event = session.receive(frames.encode(Kind.REQUEST, 5))
    assert isinstance(event, IncomingTransaction)
    assert event.complete() is Result.CLOSED


class Pair(RuleBasedStateMachine):
    """Two sessions with queues between them, against sets of what must be outstanding."""

    def __init__(self) -> None:
        super().__init__()
        self.ways: tuple[deque[bytes], deque[bytes]] = (deque(), deque())
        self.slots = Slots(3), Slots(2)
        self.front = Session(QUOTAS, *self.slots, self.ways[0].append)
        self.back = Session(QUOTAS, Slots(3), Slots(2), self.ways[1].append)
        self.front.receive(frames.hello(QUOTAS))
        self.back.receive(frames.hello(QUOTAS))
        self.next = 0
        self.waiting: dict[int, bool] = {}  # number -> ordered
        self.order: list[int] = []
        self.held: list[IncomingTransaction | IncomingMessage] = []
        self.results: dict[int, Completion] = {}
        self.executed: set[int] = set()

    def _done(self, number: int) -> Callable[[Completion], None]:
        def done(completion: Completion) -> None:
            assert number not in self.results, "completed twice"
            self.results[number] = completion
            if self.waiting.pop(number):
                assert self.order.pop(0) == number, "not in the order of submission"
        return done

    @precondition(lambda self: not self.front.over)
    @rule(ordered=st.booleans(), message=st.booleans())
    def submit(self, ordered: bool, message: bool) -> None:
        number, body = self.next, self.next.to_bytes(4, "little")
        if message:
            result = self.front.submit_message(body, self._done(number))
            ordered = False
        else:
            result = self.front.submit_transaction(body, self._done(number), ordered=ordered)
        assert result in (Result.OK, Result.BACK_PRESSURED)
        if result is Result.OK:
            self.next += 1
            self.waiting[number] = ordered
            if ordered:
                self.order.append(number)

    @precondition(lambda self: self.ways[0] and not self.back.over)
    @rule()
    def arrive(self) -> None:
        event = self.back.receive(self.ways[0].popleft())
        assert isinstance(event, IncomingMessage | IncomingTransaction)
        body = event.parameters if isinstance(event, IncomingTransaction) else event.body
        number = int.from_bytes(body, "little")
        assert number not in self.executed, "executed twice"
        self.executed.add(number)
        self.held.append(event)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        event = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert event.complete() is (Result.CLOSED if self.back.over else Result.OK)

    @precondition(lambda self: self.ways[1] and not self.front.over)
    @rule()
    def answer(self) -> None:
        completions = self.front.receive(self.ways[1].popleft())
        assert isinstance(completions, list)
        for done, completion in completions:
            assert done is not None
            done(completion)

    @precondition(lambda self: not self.front.over)
    @rule()
    def lose(self) -> None:
        answered = self.results.copy()
        for done, completion in self.front.end("lost"):
            assert done is not None
            done(completion)
        self.back.end("lost")
        assert not self.waiting
        assert all(self.results[number] == completion for number, completion in answered.items())
        for way in self.ways:
            way.clear()

    @precondition(lambda self: self.front.over and not self.held)
    @rule()
    def again(self) -> None:
        """A new session on the same slots."""
        self.front = Session(QUOTAS, *self.slots, self.ways[0].append)
        self.back = Session(QUOTAS, Slots(3), Slots(2), self.ways[1].append)
        self.front.receive(frames.hello(QUOTAS))
        self.back.receive(frames.hello(QUOTAS))

    @invariant()
    def nothing_is_lost(self) -> None:
        assert len(self.waiting) + len(self.results) == self.next
        assert sum(slots.outstanding for slots in self.slots) == len(self.waiting)


TestPair = Pair.TestCase
TestPair.settings = settings(max_examples=150, stateful_step_count=40)


def test_a_slot_outlives_the_count_of_its_uses() -> None:
    """A tag says how often its slot was used in 16 bits: the use after the last of them is one like any other."""
    for end in ("answered", "lost"):
        slots = Slots(1)
        for _ in range(0xFFFF):
            slots.answer(slots.take(None, ordered=False), Completion(Result.OK))
        tag = slots.take(None, ordered=False)
        assert tag == 0
        over = slots.answer(tag, Completion(Result.OK)) if end == "answered" else slots.fail(Completion(Result.OK))
        assert len(over) == 1
        assert slots.outstanding == 0
