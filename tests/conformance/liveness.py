"""Scenarios of progress: pairs mirrored across one link, and a stack of back ends, saturated at the smallest quotas.

A middle completes what it was asked only when its own lower transaction has completed: if any two of them shared a
pool, or a reply could be held up by a request, they would stop for ever. Each scenario runs several connections over
one link, at places that `beside` counts from the scenario's address.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from idc.domain import Service
from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Quotas, Result
from idc.endpoint.together import drive as drive_all
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from idc.endpoint import Resources

#: Round trips of each kind that a front end has to get through.
COUNT = 150
#: Seconds for all of them, on a machine that is busy with other things.
PATIENCE = 60.0
#: Connections that a scenario may use beside its first.
PLACES = 4

_SINGLE = Service("service", Quotas(requests=1, messages=1, parameter_bytes=64, status_bytes=64), outstanding=1)


def beside(address: str, n: int) -> str:
    """The n-th place of that link; 0 is the address itself. Both sides count alike."""
    scheme, _, rest = address.partition(":")
    if n == 0:
        return address
    if scheme.startswith("tcp-"):
        host, _, port = rest.rpartition(":")
        return f"{scheme}:{host}:{int(port) + n}"
    return f"{address}-{n}"


def single() -> Resources:
    """One request and one message at a time, each way."""
    return _SINGLE.resources()


def turn(endpoints: Sequence[Endpoint], *, until: Callable[[], bool], each: Callable[[], None] | None = None) -> None:
    """Drive all of them from one thread, as `Domain.run` does; `each` is called between two turns."""
    deadline = time.monotonic() + PATIENCE
    while not until():
        assert time.monotonic() < deadline, f"no progress: {[(e.state, e.reason, e.outstanding) for e in endpoints]}"
        if each is not None:
            each()
        drive_all(endpoints, 0.05)


def gone(*endpoints: Endpoint) -> None:
    """Destroy them, and see that it completes."""
    told: list[Endpoint] = []
    for endpoint in endpoints:
        endpoint.destroy(lambda endpoint=endpoint: told.append(endpoint))  # type: ignore[misc]
    turn(endpoints, until=lambda: len(told) == len(endpoints))


class Counting(Client):
    """Counts ends of connections, and what it holds at a time."""

    def __init__(self) -> None:
        self.cycles = 0
        self.handled = 0

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        self.cycles += 1
        done()


class Bottom(Counting):
    """Answers at once."""

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.handled += 1
        transaction.complete(transaction.parameters + b".")


class Middle(Counting):
    """A back end that is a front end below: completes nothing before its lower one has completed.

    Attributes:
        most: most items held at a time; the quotas promise one of each kind.
    """

    def __init__(self, place: str) -> None:
        super().__init__()
        self.lower = Endpoint(open_port(place), Counting(), single())
        self.most = 0
        self._requests: deque[IncomingTransaction] = deque()
        self._messages: deque[IncomingMessage] = deque()
        self._held = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self._requests.append(transaction)
        self._took()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self._messages.append(message)
        self._took()

    def _took(self) -> None:
        self._held += 1
        self.most = max(self.most, self._held)
        self.press()

    def press(self) -> None:
        """Pass on what waits, as far as the lower quotas allow."""
        while self._requests:
            item = self._requests[0]
            if self.lower.submit_transaction(item.parameters, lambda c, t=item: self._answered(t, c),  # type: ignore[misc]
                                             ) is not Result.OK:
                break
            self._requests.popleft()
        while self._messages:
            message = self._messages[0]
            if self.lower.submit_message(message.body, lambda c, m=message: self._delivered(m)  # type: ignore[misc]
                                         ) is not Result.OK:
                break
            self._messages.popleft()

    def _answered(self, transaction: IncomingTransaction, completion: Completion) -> None:
        self._held -= 1
        self.handled += 1
        if completion.result is Result.OK:
            transaction.complete(completion.status + b"|")
        else:
            transaction.fail(f"the lower back end: {completion.result.value}")

    def _delivered(self, message: IncomingMessage) -> None:
        self._held -= 1
        message.complete()


class Front(Counting):
    """Keeps one transaction and one message under way until COUNT of each have completed."""

    def __init__(self, place: str, levels: int) -> None:
        super().__init__()
        self.answers = 0
        self.delivered = 0
        self.pressed = 0
        self._suffix = b"." + b"|" * levels
        self.endpoint = Endpoint(open_port(place), self, single())

    @property
    def finished(self) -> bool:
        """Whether both kinds got through."""
        return self.answers >= COUNT and self.delivered >= COUNT

    def press(self) -> None:
        """Submit until the quotas stop it."""
        body = b"%d" % self.answers
        while (result := self.endpoint.submit_transaction(body, lambda c: self._answered(body, c))) is Result.OK:
            pass
        self.pressed += result is Result.BACK_PRESSURED
        while self.endpoint.submit_message(b"m", self._delivered) is Result.OK:
            pass

    def _answered(self, body: bytes, completion: Completion) -> None:
        assert completion.result is Result.OK, completion
        assert completion.status == body + self._suffix
        self.answers += 1

    def _delivered(self, completion: Completion) -> None:
        assert completion.result is Result.OK, completion
        self.delivered += 1

    def settle(self, others: Sequence[Endpoint]) -> None:
        """Let what is under way complete, then end."""
        turn([self.endpoint, *others], until=lambda: self.endpoint.outstanding == 0)
        assert self.pressed
        gone(self.endpoint)


def _pairs(address: str, mine: int, theirs: int) -> None:
    front = Front(beside(address, mine), levels=1)
    middle = Middle(beside(address, 2 + theirs))
    upper = Endpoint(open_port(beside(address, theirs)), middle, single())
    bottom = Bottom()
    lowest = Endpoint(open_port(beside(address, 2 + mine)), bottom, single())
    others = [upper, middle.lower, lowest]

    def press() -> None:
        if not front.finished:
            front.press()
        middle.press()

    turn([front.endpoint, *others], until=lambda: front.finished, each=press)
    front.settle(others)
    turn(others, until=lambda: middle.cycles > 0, each=middle.press)  # the other side has had enough, too
    assert middle.handled >= COUNT
    assert middle.most <= 2  # one request and one message
    gone(*others)


def pairs_front(address: str) -> None:
    """Each side is client of the other and server to it, and each server asks back before it answers."""
    _pairs(address, 0, 1)


def pairs_back(address: str) -> None:
    _pairs(address, 1, 0)


def stack_front(address: str) -> None:
    """Front end -> B1 -> B2 -> B3, folded across one link: this side has the front end and B2."""
    front = Front(address, levels=2)
    middle = Middle(beside(address, 2))
    upper = Endpoint(open_port(beside(address, 1)), middle, single())
    others = [upper, middle.lower]

    def press() -> None:
        front.press()
        middle.press()

    turn([front.endpoint, *others], until=lambda: front.finished, each=press)
    front.settle(others)
    turn(others, until=lambda: middle.cycles > 0, each=middle.press)
    assert middle.handled >= COUNT
    assert middle.most <= 2
    gone(*others)


def stack_back(address: str) -> None:
    middle, bottom = Middle(beside(address, 1)), Bottom()
    upper = Endpoint(open_port(address), middle, single())
    lowest = Endpoint(open_port(beside(address, 2)), bottom, single())
    turn([upper, middle.lower, lowest], until=lambda: middle.cycles > 0, each=middle.press)
    assert bottom.handled >= COUNT
    assert middle.most <= 2
    gone(upper, middle.lower, lowest)
