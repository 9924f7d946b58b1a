"""python stack.py front|middle|back ROUTE: one domain of a stack of three drivers, in a process or VM of its own.

    front end ── requests, with a reference to its buffer ──▶ middle ── the same reference ──▶ back end
        its own buffers            adds where the partition begins            the device: pages of its own

A request names an offset in the partition and the buffer; the middle adds the partition's offset and passes the
reference on, without a look at the bytes. The back end moves them once, between the front end's buffer and the device,
by the route given: "host" (the broker copies) or "direct" (all three map one region). At the end each prints what it
knows as a line of JSON. Addresses are in IDC_SERVICES (upper: front and middle, lower: middle and back) and in
IDC_CONTROL.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
import sys
import time
from typing import TYPE_CHECKING

from idc.domain import Domain, Service
from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Quotas, Result, State
from idc.endpoint.together import drive
from idc.remote import Access, Route
from idc.remote.reference import REFERENCE_BYTES

if TYPE_CHECKING:
    from idc.buffers import LocalBuffer

UPPER = Service("upper", Quotas(8, 4, 128, 128), 8)
LOWER = Service("lower", Quotas(8, 4, 128, 128), 8)
PARTITION = 5 << 20  # where in the device it begins
DEVICE = 12 << 20
CHUNK = 1 << 20
CHUNKS = 4
READ, WRITE = 1, 2
REQUEST = struct.Struct(f"<BQ{REFERENCE_BYTES}s")
ROUTES = {"host": Route.HOST, "direct": Route.DIRECT}
LIMIT = 120.0


def report(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def digest(domain: Domain, service: Service, buffer: LocalBuffer) -> str:
    return hashlib.sha256(domain.region(service).pool.view(buffer)).hexdigest()


class Front(Client):
    """Writes CHUNKS chunks to the partition, overwrites its buffers, reads the chunks back in another order."""

    def __init__(self) -> None:
        self.domain = Domain.here()
        self.exports = self.domain.share()
        self.endpoint = self.domain.endpoint(UPPER, self, self.domain.resources(UPPER))
        self.pool = self.domain.region(UPPER).pool

    def until(self, condition: object) -> None:
        deadline = time.monotonic() + LIMIT
        ends = [self.endpoint] + ([self.domain.control.endpoint] if self.domain.control is not None else [])
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise SystemExit(f"front: not in time: {self.endpoint.state.value}, {self.endpoint.reason}")
            drive(ends, 1.0)

    def submit(self, op: int, offset: int, reference: bytes) -> bytes:
        told: list[Completion] = []
        assert self.endpoint.submit_transaction(REQUEST.pack(op, offset, reference), told.append) is Result.OK
        self.until(lambda: bool(told))
        if told[0].result is not Result.OK or told[0].error:
            raise SystemExit(f"front: request {op} at {offset}: {told[0]}")
        return told[0].status

    def run(self) -> None:
        self.until(lambda: self.endpoint.state is State.CONNECTED)
        buffers = [self.pool.allocate(CHUNK) for _ in range(CHUNKS)]
        sent, got, routes = [], [], set()
        for n, buffer in enumerate(buffers):
            with self.pool.view(buffer) as view:
                view[:] = secrets.token_bytes(CHUNK)
            sent.append(digest(self.domain, UPPER, buffer))
            registration = self.endpoint.register(buffer, Access.READ)
            routes.add(self.submit(WRITE, n * CHUNK, registration.reference()).decode())
            self.unregister(registration)
        for n, buffer in enumerate(buffers):
            with self.pool.view(buffer) as view:
                view[:] = bytes(CHUNK)
            registration = self.endpoint.register(buffer, Access.WRITE)
            routes.add(self.submit(READ, (CHUNKS - 1 - n) * CHUNK, registration.reference()).decode())
            self.unregister(registration)
            got.append(digest(self.domain, UPPER, buffer))
        self.endpoint.submit_message(b"end")
        self.until(lambda: not self.endpoint.outstanding)
        report(role="front", sent=sent, got=got[::-1], routes=sorted(routes), copied=self.exports.counter.copied)

    def unregister(self, registration: object) -> None:
        told: list[Completion] = []
        registration.unregister(told.append)  # type: ignore[attr-defined]
        self.until(lambda: bool(told))
        assert told[0].result is Result.OK, told[0]


class Lower(Client):
    """The middle's client end: what waits for the back end goes when it is there."""

    def __init__(self, middle: Middle) -> None:
        self.middle = middle

    def connect(self, endpoint: Endpoint) -> None:
        waiting, self.middle.waiting = self.middle.waiting, []
        for transaction in waiting:
            self.middle.transaction(self.middle.upper, transaction)


class Middle(Client):
    """Partitions: its own requests are those that came, further on."""

    def __init__(self) -> None:
        self.domain = Domain.here()
        self.exports = self.domain.share()
        self.waiting: list[IncomingTransaction] = []
        self.upper = self.domain.endpoint(UPPER, self, self.domain.resources(UPPER))
        self.lower = self.domain.endpoint(LOWER, Lower(self), self.domain.resources(LOWER))
        self.passed = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        if self.lower.state is not State.CONNECTED:
            self.waiting.append(transaction)
            return
        op, offset, reference = REQUEST.unpack(transaction.parameters)
        buffer = endpoint.remote(reference)

        def done(completion: Completion) -> None:
            buffer.close()
            if completion.result is Result.OK:
                transaction.complete(completion.status, completion.error)
            else:
                transaction.fail(completion.reason)

        result = self.lower.submit_transaction(REQUEST.pack(op, PARTITION + offset, buffer.forward()), done)
        if result is not Result.OK:
            buffer.close()
            transaction.fail(f"the back end: {result.value}")
        self.passed += buffer.length

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        message.complete()
        self.lower.submit_message(message.body, lambda _: self.domain.stop())

    def run(self) -> None:
        self.domain.run()
        report(role="middle", passed=self.passed, copied=self.exports.counter.copied)


class Back(Client):
    """The device."""

    def __init__(self, route: Route) -> None:
        self.domain = Domain.here()
        self.exports = self.domain.share()
        self.endpoint = self.domain.endpoint(LOWER, self, self.domain.resources(LOWER))
        self.device = self.domain.region(LOWER).pool.allocate(DEVICE)
        self.route = route
        self.moved = self.copied = 0

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        op, offset, reference = REQUEST.unpack(transaction.parameters)
        buffer = endpoint.remote(reference, route=self.route)
        here = self.device.slice(offset, buffer.length)

        def done(completion: Completion) -> None:
            self.moved += buffer.length
            self.copied += buffer.counter.copied
            route = buffer.route.value if buffer.route is not None else "none"
            buffer.close()
            if completion.result is Result.OK:
                transaction.complete(route.encode())
            else:
                transaction.fail(f"{completion.result.value} {completion.error}: {completion.reason}")

        result = buffer.receive_from(here, done) if op == WRITE else buffer.send_to(here, done)
        if result is not Result.OK:
            buffer.close()
            transaction.fail(f"the transfer did not begin: {result.value}")

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        message.complete()
        self.domain.stop()

    def run(self) -> None:
        self.domain.run()
        self.endpoint.pump(0.0)
        chunks = [digest(self.domain, LOWER, self.device.slice(PARTITION + n * CHUNK, CHUNK)) for n in range(CHUNKS)]
        report(role="back", device=chunks, moved=self.moved, copied=self.copied, served=self.exports.counter.copied)


def main() -> None:
    role, route = sys.argv[1:]
    if role == "front":
        Front().run()
    elif role == "middle":
        Middle().run()
    else:
        Back(ROUTES[route]).run()


if __name__ == "__main__":
    main()
