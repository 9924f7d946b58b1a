"""What every transport has to do for two domains: pairs of clients, with no word about how they are connected.

Each scenario is two functions, of a front and a back end; both get the address where they meet and end by themselves.
Runs from `side.py`, in a thread, a process, or a VM.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import liveness

from idc.domain import Domain, Service
from idc.endpoint import (
    Client,
    Completion,
    Endpoint,
    IncomingMessage,
    IncomingTransaction,
    Quotas,
    Resources,
    Result,
    State,
)
from idc.endpoint.aio import AsyncCaller
from idc.errors import HandlerFailedError, MisuseError, OutcomeUnknownError, TooBigError, TransactionError
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable

ErrorT = TypeVar("ErrorT", bound=Exception)

LIMIT = 20.0
SMALL = Service("service", Quotas(requests=4, messages=4, parameter_bytes=64, status_bytes=64), outstanding=8)
SINGLE = Service("service", Quotas(requests=1, messages=1, parameter_bytes=64, status_bytes=64), outstanding=1)
WIDE = Service("service", Quotas(requests=8, messages=8, parameter_bytes=256, status_bytes=256), outstanding=8)


def number(n: int) -> bytes:
    return n.to_bytes(4, "little")


def failure(kind: type[ErrorT], call: Callable[[], object]) -> ErrorT:
    """The exception of that kind which the call must raise. (There is no pytest in a guest.)"""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def drive(*endpoints: Endpoint, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT
    while not until():
        assert time.monotonic() < deadline, f"nothing after {LIMIT:g} s: {[(e.state, e.reason) for e in endpoints]}"
        for endpoint in endpoints:
            endpoint.pump(0.05 / len(endpoints))


def destroyed(*endpoints: Endpoint) -> None:
    """Destroy, and see that it completes."""
    told: list[Endpoint] = []
    for endpoint in endpoints:
        endpoint.destroy(lambda endpoint=endpoint: told.append(endpoint))  # type: ignore[misc]
    drive(*endpoints, until=lambda: len(told) == len(endpoints))


class Recorder(Client):
    """Notes what it is told, and checks the order that docs/idc.md promises."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def _tell(self, what: str, *after: str) -> None:
        assert (self.told[-1] if self.told else "") in after, (what, self.told)
        self.told.append(what)

    def appear(self, endpoint: Endpoint) -> None:
        self._tell("appear", "", "disappear")

    def connect(self, endpoint: Endpoint) -> None:
        assert endpoint.state is State.CONNECTED
        self._tell("connect", "appear", "disconnect")

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        assert endpoint.outstanding == 0
        self._tell("disconnect", "connect")
        done()

    def disappear(self, endpoint: Endpoint) -> None:
        self._tell("disappear", "appear", "disconnect")

    @property
    def cycles(self) -> int:
        return self.told.count("disconnect")


class Backwards(Recorder):
    """Holds transactions until it has a few, or a moment has passed, then answers the newest first."""

    def __init__(self, hold: int) -> None:
        super().__init__()
        self.hold = hold
        self.held: list[IncomingTransaction] = []
        self.seen: list[int] = []

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.held.append(transaction)
        self.seen.append(int.from_bytes(transaction.parameters[:4], "little"))
        if len(self.held) >= self.hold:
            self.release()

    def release(self) -> None:
        while self.held:
            transaction = self.held.pop()
            transaction.complete(transaction.parameters, error=int.from_bytes(transaction.parameters[:2], "little") % 3)


def _many_front(address: str, *, ordered: bool) -> None:
    client, count = Recorder(), 200
    endpoint = Endpoint(open_port(address), client, SMALL.resources())
    answered: list[int] = []
    pressed = 0

    def done(n: int, completion: Completion) -> None:
        assert completion.result is Result.OK
        assert completion.status == number(n)
        assert completion.error == n % 3
        answered.append(n)

    drive(endpoint, until=lambda: endpoint.state is State.CONNECTED)
    n = 0
    while n < count:
        result = endpoint.submit_transaction(number(n), lambda c, n=n: done(n, c), ordered=ordered,  # type: ignore[misc]
                                             notify=False)
        if result is Result.OK:
            n += 1
            continue
        assert result is Result.BACK_PRESSURED
        assert endpoint.outstanding == SMALL.quotas.requests  # the peer's quota is the smaller one
        pressed += 1
        before = len(answered)
        drive(endpoint, until=lambda before=before: len(answered) > before)  # type: ignore[misc]
    drive(endpoint, until=lambda: len(answered) == count)
    assert pressed
    assert sorted(answered) == list(range(count))
    assert (answered == list(range(count))) == ordered
    destroyed(endpoint)
    assert client.told == ["appear", "connect", "disconnect", "disappear"]


def _many_back(address: str) -> None:
    client = Backwards(SMALL.quotas.requests)
    endpoint = Endpoint(open_port(address), client, SMALL.resources())
    drive(endpoint, until=lambda: "disconnect" in client.told)
    assert client.seen == list(range(200))
    destroyed(endpoint)


def many_front(address: str) -> None:
    """Many outstanding, answered in another order, each once."""
    _many_front(address, ordered=False)


def ordered_front(address: str) -> None:
    """The same, completed in the order of submission."""
    _many_front(address, ordered=True)


class Collector(Recorder):
    """Holds messages, completes them when told."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies: list[bytes] = []
        self.open: deque[IncomingMessage] = deque()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.bodies.append(message.body)
        self.open.append(message)

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        while self.open:
            self.open.popleft().complete()
        transaction.complete(number(len(self.bodies)))


def messages_front(address: str) -> None:
    """Messages are bounded by the receiver's completions, and arrive whole, in order."""
    endpoint = Endpoint(open_port(address), Recorder(), SMALL.resources())
    drive(endpoint, until=lambda: endpoint.state is State.CONNECTED)
    completed: list[Completion] = []
    quota = SMALL.quotas.messages
    for lap in range(10):
        for n in range(quota):
            assert endpoint.submit_message(bytes([lap, n] * n), completed.append, notify=n == quota - 1) is Result.OK
        assert endpoint.submit_message(b"one too many") is Result.BACK_PRESSURED
        answers: list[Completion] = []
        assert endpoint.submit_transaction(b"complete them", answers.append) is Result.OK
        drive(endpoint, until=lambda answers=answers: bool(answers))  # type: ignore[misc]
        assert answers[0].status == number((lap + 1) * quota)
        assert len(completed) == (lap + 1) * quota
    assert all(completion.result is Result.OK for completion in completed)
    destroyed(endpoint)


def messages_back(address: str) -> None:
    client = Collector()
    endpoint = Endpoint(open_port(address), client, SMALL.resources())
    drive(endpoint, until=lambda: "disconnect" in client.told)
    assert client.bodies == [bytes([lap, n] * n) for lap in range(10) for n in range(SMALL.quotas.messages)]
    destroyed(endpoint)


CYCLES = 5


def cycle_front(address: str) -> None:
    """The back end ends the connection under load again and again: each cycle is seen here, nothing comes twice."""
    client = Recorder()
    endpoint = Endpoint(open_port(address), client, WIDE.resources())
    completions: dict[int, Completion] = {}
    n = 0

    def done(n: int, completion: Completion) -> None:
        assert n not in completions
        completions[n] = completion

    deadline = time.monotonic() + LIMIT
    while client.cycles < CYCLES:
        assert time.monotonic() < deadline
        while endpoint.submit_transaction(number(n) + number(endpoint.connections),
                                          lambda c, n=n: done(n, c)) is Result.OK:  # type: ignore[misc]
            n += 1
        endpoint.pump(0.05)
    drive(endpoint, until=lambda: endpoint.state is State.CONNECTED)
    assert sorted(completions) == list(range(n))
    assert {c.result for c in completions.values()} <= {Result.OK, Result.OUTCOME_UNKNOWN}
    for m, completion in completions.items():
        assert completion.result is Result.OUTCOME_UNKNOWN or completion.status[:4] == number(m)
    drive(endpoint, until=lambda: endpoint.submit_transaction(number(n)) is Result.OK)  # then the back end is connected
    drive(endpoint, until=lambda: endpoint.outstanding == 0)
    destroyed(endpoint)


def cycle_back(address: str) -> None:
    client = Backwards(5)
    endpoint = Endpoint(open_port(address), client, WIDE.resources())
    connections: set[int] = set()
    stale: list[IncomingTransaction] = []
    while client.cycles < CYCLES:
        drive(endpoint, until=lambda: endpoint.state is State.CONNECTED)
        seen = len(client.seen)
        drive(endpoint, until=lambda seen=seen: len(client.seen) >= seen + 23)  # type: ignore[misc]
        stale = client.held
        client.held = []
        for transaction in stale:  # what was received in this connection was sent in it, and no other holds any
            connections.add(int.from_bytes(transaction.parameters[4:8], "little"))
        assert len({bytes(t.parameters[4:8]) for t in stale}) <= 1
        endpoint.disconnect("the scenario says so")
        assert endpoint.state is not State.CONNECTED
        for transaction in stale:
            assert transaction.complete(b"") is Result.CLOSED
    assert len(client.seen) == len(set(client.seen)), "executed twice"
    client.hold = 1
    cycles = client.cycles
    drive(endpoint, until=lambda: endpoint.connections > CYCLES and client.cycles > cycles)
    destroyed(endpoint)


class Faulty(Recorder):
    """Makes the mistakes that docs/idc.md lists."""

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        what = bytes(transaction.parameters)
        if what == b"raise":
            raise ValueError("as asked")
        if what == b"code":
            transaction.complete(b"why", error=4711)
        elif what == b"long":
            failure(TooBigError, lambda: transaction.complete(bytes(65)))
            transaction.complete(b"refused")
        elif what == b"twice":
            transaction.complete(b"once")
            failure(MisuseError, lambda: transaction.complete(b"again"))
        elif what == b"cut":
            endpoint.disconnect("cut off")
            assert transaction.complete(b"too late") is Result.CLOSED
        else:
            transaction.complete(what)


def mistakes_front(address: str) -> None:
    """Each mistake is an error to the one who makes it, and the connection stands."""
    domain = Domain({"service": address})
    with domain.connect(SMALL) as caller:
        assert caller.transact(b"fine", timeout=LIMIT) == b"fine"
        assert caller.transact(b"fine") == caller.transact(bytearray(b"fine")) == b"fine"  # type: ignore[arg-type]
        assert "65" in str(failure(TooBigError, lambda: caller.transact(bytes(65))))
        failed = failure(HandlerFailedError, lambda: caller.transact(b"raise", timeout=LIMIT))
        assert str(failed) == "ValueError: as asked"
        refused = failure(TransactionError, lambda: caller.transact(b"code", timeout=LIMIT))
        assert (refused.code, refused.status) == (4711, b"why")
        assert caller.transact(b"long", timeout=LIMIT) == b"refused"
        assert caller.transact(b"twice", timeout=LIMIT) == b"once"
        assert caller.endpoint.connections == 1
        assert "cut off" in str(failure(OutcomeUnknownError, lambda: caller.transact(b"cut", timeout=LIMIT)))
        assert caller.transact(b"again", timeout=LIMIT) == b"again"
        assert caller.endpoint.connections == 2


def mistakes_back(address: str) -> None:
    client = Faulty()
    endpoint = Endpoint(open_port(address), client, SMALL.resources())
    drive(endpoint, until=lambda: client.cycles == 2)
    destroyed(endpoint)


class Selfish(Recorder):
    """Destroys its endpoint from within a handler."""

    def __init__(self) -> None:
        super().__init__()
        self.destroyed = 0
        self.last: IncomingTransaction | None = None

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.last = transaction
        endpoint.destroy(self._gone)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        self._tell("disconnect", "connect")
        done()
        assert endpoint.state is State.DESTROYING  # until what was received is completed too

    def _gone(self) -> None:
        self.destroyed += 1


def reuse_front(address: str) -> None:
    """Resources serve one endpoint after another, also after one destroyed itself."""
    client = Recorder()
    endpoint = Endpoint(open_port(address), client, SMALL.resources())
    for _ in range(3):
        drive(endpoint, until=lambda: endpoint.state is State.CONNECTED)
        answers: list[Completion] = []
        assert endpoint.submit_transaction(b"destroy yourself", answers.append) is Result.OK
        drive(endpoint, until=lambda answers=answers: bool(answers))  # type: ignore[misc]
        assert answers[0].result is Result.OUTCOME_UNKNOWN
    drive(endpoint, until=lambda: endpoint.state is State.ABSENT)
    destroyed(endpoint)


def reuse_back(address: str) -> None:
    resources = SMALL.resources()
    for _ in range(3):
        client = Selfish()
        endpoint = Endpoint(open_port(address), client, resources)
        drive(endpoint, until=lambda client=client: client.last is not None)  # type: ignore[misc]
        assert client.last is not None
        assert client.last.complete() is Result.CLOSED
        assert endpoint.state is State.DESTROYED
        assert client.destroyed == 1
        assert endpoint.submit_transaction(b"") is Result.CLOSED


STREAM_BYTES = 300_000


def _pattern() -> bytes:
    return b"".join(hashlib.sha256(number(n)).digest() for n in range(STREAM_BYTES // 32))


def stream_front(address: str) -> None:
    """The socket-like face: bytes there and back, flushed."""
    data = _pattern()
    with Domain({"service": address}).stream(WIDE) as stream:
        stream.send(data, timeout=LIMIT)
        stream.flush(timeout=LIMIT)
        back = b""
        while len(back) < len(data):
            back += stream.receive(7000, timeout=LIMIT)
        assert back == data
        stream.send(b"!", timeout=LIMIT)
        stream.flush(timeout=LIMIT)


def stream_back(address: str) -> None:
    data, got = _pattern(), b""
    with Domain({"service": address}).stream(WIDE) as stream:
        while len(got) < len(data):
            got += stream.receive(1 << 16, timeout=LIMIT)
        assert got == data
        stream.send(got, timeout=LIMIT)
        stream.flush(timeout=LIMIT)
        assert stream.receive(1, timeout=LIMIT) == b"!"
        assert stream.receive(1, timeout=LIMIT) == b""


class Mirror(Recorder):
    """Asks the other side as fast as the quotas allow, and answers it."""

    def __init__(self, endpoint_count: int) -> None:
        super().__init__()
        self.wanted = endpoint_count
        self.answers = 0
        self.handled = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.handled += 1
        transaction.complete(transaction.parameters)

    def press(self, endpoint: Endpoint) -> None:
        while endpoint.submit_transaction(number(self.answers), self._answered) is Result.OK:
            pass
        while endpoint.submit_message(b"and a message") is Result.OK:
            pass

    def _answered(self, completion: Completion) -> None:
        self.answers += completion.result is Result.OK


def mirror(address: str) -> None:
    """Both sides saturate each other at the smallest quotas: both get on."""
    client = Mirror(300)
    endpoint = Endpoint(open_port(address), client, SINGLE.resources())
    deadline = time.monotonic() + LIMIT
    while client.answers < client.wanted or client.handled < client.wanted:
        assert time.monotonic() < deadline, (client.answers, client.handled)
        if endpoint.connections > 1:
            break  # the other side has had enough, and so it has answered enough
        client.press(endpoint)
        endpoint.pump(0.05)
        if "disconnect" in client.told:
            break
    assert client.answers >= client.wanted - 2
    assert client.handled >= client.wanted - 2
    destroyed(endpoint)


def gather_front(address: str) -> None:
    """The asyncio face: many awaited at once."""

    async def ask() -> None:
        async with asyncio.timeout(LIMIT), AsyncCaller(open_port(address), WIDE.resources()) as caller:
            answers = await asyncio.gather(*(caller.transact(number(n)) for n in range(100)))
            assert answers == [number(n)[::-1] for n in range(100)]
            await asyncio.gather(*(caller.send(number(n)) for n in range(50)))
            assert await caller.transact(b"count") == number(50)[::-1]

    asyncio.run(ask())


class Counting(Recorder):
    """Turns parameters round; counts messages."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.over = asyncio.Event()

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        super().disconnect(endpoint, done)
        self.over.set()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.count += 1
        message.complete()

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        what = transaction.parameters
        transaction.complete((number(self.count) if what == b"count" else what)[::-1])


def gather_back(address: str) -> None:
    async def serve() -> None:
        client = Counting()
        async with asyncio.timeout(LIMIT), AsyncCaller(open_port(address), WIDE.resources(), client):
            await client.over.wait()

    asyncio.run(serve())


@dataclass(frozen=True)
class Scenario:
    """Two clients that meet."""

    front: Callable[[str], None]
    back: Callable[[str], None]


SCENARIOS = {
    "many": Scenario(many_front, _many_back),
    "ordered": Scenario(ordered_front, _many_back),
    "messages": Scenario(messages_front, messages_back),
    "cycle": Scenario(cycle_front, cycle_back),
    "mistakes": Scenario(mistakes_front, mistakes_back),
    "reuse": Scenario(reuse_front, reuse_back),
    "stream": Scenario(stream_front, stream_back),
    "mirror": Scenario(mirror, mirror),
    "gather": Scenario(gather_front, gather_back),
    "pairs": Scenario(liveness.pairs_front, liveness.pairs_back),
    "stack": Scenario(liveness.stack_front, liveness.stack_back),
}

__all__ = ["SCENARIOS", "Resources", "Scenario"]
