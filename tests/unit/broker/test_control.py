"""A domain's side of the control link, against a broker that the test plays."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Resources, Result, State
from idc.errors import MisuseError, TimedOutError
from idc.remote import Access, Exports
from idc.remote import controlframes as frames
from idc.remote.control import Control
from idc.remote.controlframes import Identity
from idc.remote.reference import REFERENCE_BYTES, Reference, mint
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.remote.resolution import Resolution

WHO = Identity(UUID(int=1), 4, "front")
MINE = mint(Reference(WHO.domain, WHO.incarnation, 0, 0, Access.READ | Access.WRITE, 0, 100), bytes(32))
THEIRS = mint(Reference(UUID(int=2), 9, 0, 0, Access.READ | Access.WRITE, 0, 100), bytes(32))
LIMIT = 20.0


class FakeBroker(Client):
    """Records what it is asked, and answers when told to."""

    def __init__(self) -> None:
        self.asked: list[IncomingTransaction] = []

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        raise AssertionError("a domain sends no messages")

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.asked.append(transaction)


class FakeOwner:
    """Exports that give what they are told to give."""

    def __init__(self, answer: Resolution) -> None:
        self.answer = answer
        self.released: list[int] = []
        self.dropped = 0

    def resolve(self, data: bytes, want: Access, holder: Control) -> Resolution:
        return self.answer

    def release(self, holder: Control, lease: int) -> None:
        if lease == 404:
            raise MisuseError("no such lease")
        self.released.append(lease)

    def drop_holder(self, holder: Control) -> None:
        self.dropped += 1


class Both:
    """The two ends in one thread."""

    def __init__(self) -> None:
        one, two = meeting()
        self.client = FakeBroker()
        accepts = frames.DOMAIN_ACCEPTS
        self.broker = Endpoint(one, self.client, Resources(frames.BROKER_ACCEPTS, requests=accepts.requests,
                                                          messages=accepts.messages))
        self.control = Control(two)
        self.until(lambda: self.broker.state is self.control.endpoint.state is State.CONNECTED)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline
            self.broker.pump(0.0)
            self.control.endpoint.pump(0.0)

    def identify(self) -> None:
        self.broker.submit_message(frames.identity(WHO))
        self.until(lambda: self.control.identity is not None)

    def ask(self, body: bytes) -> Completion:
        """A transaction of the broker's."""
        told: list[Completion] = []
        assert self.broker.submit_transaction(body, told.append) is Result.OK
        self.until(lambda: bool(told))
        return told[0]

    def tell(self, body: bytes) -> None:
        told: list[Completion] = []
        assert self.broker.submit_message(body, told.append) is Result.OK
        self.until(lambda: bool(told))


@pytest.fixture
def both() -> Iterator[Both]:
    ends = Both()
    yield ends
    ends.control.close()
    ends.broker.abandon()


def test_the_broker_says_who_this_domain_is(both: Both) -> None:
    with pytest.raises(TimedOutError, match="does it run"):
        both.control.identify(0.01)
    both.broker.submit_message(frames.identity(WHO))
    both.broker.pump(0.0)
    assert both.control.identify(LIMIT) == WHO
    assert both.control.identify(0.0) == WHO


def test_what_it_asks_of_the_exports(both: Both) -> None:
    body = frames.resolve(MINE, Access.READ)
    early = both.ask(body)
    assert (early.error, early.status) == (Refusal.NOT_SERVED, b"this domain exports nothing yet")
    lease = Lease(7, UUID(int=3), "", 4096, 100, Access.READ)
    owner = FakeOwner(lease)
    both.control.serve(owner)
    with pytest.raises(MisuseError, match="already"):
        both.control.serve(owner)
    for answer in (lease, OwnerCopy("its owner gives no lease"), Refused(Refusal.FORGED, "made up")):
        owner.answer = answer
        done = both.ask(body)
        assert frames.parse_answer(done.error, done.status) == answer
    for rubbish in (b"", b"\x02", b"\x02\x09" + bytes(6 + REFERENCE_BYTES), body + b"x", b"\x07" * 50):
        assert both.ask(rubbish).error == Refusal.MALFORMED
    both.tell(frames.release(7))
    both.tell(frames.release(404))  # crossed a REVOKE: nothing to do
    both.tell(b"\x05")
    both.tell(b"\x99 something newer")
    assert owner.released == [7]
    assert both.control.endpoint.state is State.CONNECTED


def test_real_exports_fit(both: Both) -> None:
    both.identify()
    both.control.serve(Exports(domain=WHO.domain, incarnation=WHO.incarnation))
    assert both.ask(frames.resolve(MINE, Access.READ)).error == Refusal.STALE
    assert both.ask(frames.resolve(THEIRS, Access.READ)).error == Refusal.NO_ROUTE


def test_a_copy_takes_its_own_lease_along_and_gives_it_back(both: Both) -> None:
    lease = Lease(5, UUID(int=3), "", 4096, 100, Access.READ)
    owner = FakeOwner(lease)
    both.control.serve(owner)
    told: list[Completion] = []
    assert both.control.copy(MINE, THEIRS, 10, told.append) is Result.OK  # who it is, it does not know yet
    both.identify()
    assert both.control.copy(MINE, THEIRS, 10, told.append, source_offset=1, target_offset=2) is Result.OK
    assert both.control.copy(THEIRS, MINE, 10, told.append) is Result.OK
    both.until(lambda: len(both.client.asked) == 3)
    first, second, third = (frames.parse_copy(t.parameters) for t in both.client.asked)
    assert (first.source_lease, first.target_lease) == (None, None)
    assert (second.source_lease, second.target_lease, second.source_offset, second.target_offset) == (lease, None, 1, 2)
    assert (third.source_lease, third.target_lease, third.source) == (None, lease, THEIRS)
    assert owner.released == []
    both.client.asked[1].complete(frames.copied(10))
    both.client.asked[2].complete(frames.reason("no"), Refusal.RIGHTS)
    both.client.asked[0].complete(frames.reason("no way"), Refusal.NO_ROUTE)
    both.until(lambda: len(told) == 3)
    assert [(c.result, c.error) for c in told] == [
        (Result.OK, 0), (Result.ERROR, Refusal.RIGHTS), (Result.ERROR, Refusal.NO_ROUTE)]
    assert told[2].reason == "the broker refuses: no way"
    assert owner.released == [5, 5]


def test_copies_leave_room_for_revoking(both: Both) -> None:
    owner = FakeOwner(OwnerCopy(""))
    both.control.serve(owner)
    both.identify()
    told: list[Completion] = []
    begun = 0
    while both.control.copy(MINE, THEIRS, 10, told.append) is Result.OK:
        begun += 1
    assert begun == 24
    for lease in range(20):
        both.control.revoke(lease)
    both.until(lambda: len(both.client.asked) == 32)
    revokes = [t for t in both.client.asked if frames.op_of(t.parameters) == frames.Op.REVOKE]
    assert [frames.parse_lease(t.parameters) for t in revokes] == list(range(8))
    for transaction in revokes:
        transaction.complete()
    both.until(lambda: owner.released == list(range(8)))
    both.until(lambda: len(both.client.asked) == 40)
    both.broker.disconnect()
    both.until(lambda: len(told) == begun)
    assert {c.result for c in told} == {Result.OUTCOME_UNKNOWN}
    assert owner.dropped == 1  # and so nothing that was not revoked yet is held


def test_nothing_is_asked_for_that_cannot_be(both: Both) -> None:
    told: list[Completion] = []
    with pytest.raises(MisuseError, match="-1 bytes"):
        both.control.copy(MINE, THEIRS, -1, told.append)
    with pytest.raises(MisuseError):
        both.control.copy(MINE, THEIRS, 1, told.append, target_offset=1 << 64)
    both.control.close()
    assert both.control.copy(MINE, THEIRS, 1, told.append) is Result.CLOSED
    assert told == []
