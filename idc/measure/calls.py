"""Commands of the measuring worker about endpoints: transactions, by handlers in the core and in Python.

The Python loops are what a user writes: `Caller.transact` for one at a time, `submit_transaction` and `pump` for many,
a Client with a handler at the other end. Depends on idc.endpoint, idc.transport and idc.measure.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.buffers import Strategy
from idc.endpoint.blocking import Caller
from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.engine import Engine
from idc.endpoint.frames import Quotas
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Result
from idc.endpoint.stream import Stream
from idc.errors import MisuseError, NotConnectedError, TimedOutError
from idc.measure.bulk import EXTRA, Consumer, Producer, fill, part_of
from idc.measure.timing import SPIN, Answer, Timing
from idc.transport.shared import SharedPort
from idc.transport.tcp import dial_port, listen_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.endpoint.results import Completion
    from idc.endpoint.session import IncomingTransaction
    from idc.region import Region
    from idc.transport.base import Port

#: Channels of the region: plain endpoints at both ends, and engines at both ends.
CALLS, PUMP = "calls", "pump"
#: Names of endpoints over TCP.
TCP, STREAM = "idc-tcp", "stream"
#: What each side accepts over shared memory.
QUOTAS = Quotas(requests=64, messages=4, parameter_bytes=200, status_bytes=200)
#: The same over TCP, where frames may be long.
LONG = Quotas(requests=64, messages=16, parameter_bytes=1 << 20, status_bytes=1 << 20)
#: A stream's, over TCP: with pieces of 64 KiB as much may be under way as fits into the buffers of a plain socket.
DEEP = Quotas(requests=0, messages=64, parameter_bytes=1 << 20, status_bytes=0)


class Server(Client):
    """Answers each transaction with what `answer` makes of its parameters; `served` counts them."""

    def __init__(self) -> None:
        self.served = 0
        self.answer: Callable[[bytes], bytes] | None = None

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See Client."""
        self.served += 1
        parameters = transaction.parameters
        transaction.complete(parameters if self.answer is None else self.answer(parameters))


class CallCommands(Timing):
    """Endpoints by name: CALLS and PUMP over shared memory, others over TCP; STREAM is a stream's."""

    def __init__(self, region: Region, limit: float) -> None:
        super().__init__(region, limit)
        self._callers: dict[str, tuple[Caller, Server]] = {}
        self._ports: dict[str, SharedPort] = {}
        self._engine: tuple[Engine, Endpoint] | None = None
        self._stream: Stream | None = None

    def close_calls(self) -> None:
        """Destroy all endpoints."""
        for caller, _ in self._callers.values():
            caller.close()
        if self._engine is not None:
            self._engine[1].destroy()
        if self._stream is not None:
            self._stream.close()

    def do_meet(self, role: str, name: str, address: str = "") -> Answer:
        """Connect endpoints, `name` at both ends; far listens where near dials, if there is an address."""
        if name == PUMP:
            engine = Engine(64, QUOTAS, handler=ffi.addressof(lib, "idc_handle_echo"), messages=4)
            endpoint = engine.endpoint(SharedPort(self._region, name, release=_nothing))
            self._engine = engine, endpoint
        else:
            port: Port
            if name == CALLS:
                port = self._ports[name] = SharedPort(self._region, name, release=_nothing)
            else:
                port = listen_port(address) if role == "far" else dial_port(address)
            if name == STREAM:
                self._stream = Stream(port, Resources(DEEP, requests=0, messages=DEEP.messages))
                self._stream.connect(self._limit)
                return {}
            client = Server()
            caller = Caller(port, Resources(QUOTAS if name == CALLS else LONG, requests=64, messages=4), client)
            self._callers[name] = caller, client
            endpoint = caller.endpoint
        deadline = time.monotonic() + self._limit
        while endpoint.state is not State.CONNECTED:
            if time.monotonic() > deadline:
                raise NotConnectedError(f"endpoints {name!r} did not connect in {self._limit:g} s: {endpoint.reason}")
            endpoint.pump(0.01)
        return {}

    def do_transact(self, role: str, api: str, mode: str | None, size: int, count: int, per: int, warm: int,
                    outstanding: int = 1, name: str = CALLS) -> Answer:  # fmt: skip
        """Transactions whose parameters and status have `size` bytes. Samples where there is one at a time."""
        if api == "core":
            return self._core(role, mode or "poll", size, count, per, warm, outstanding)
        caller, client = self._callers[name]
        if mode is not None:
            self._ports[name].spin = SPIN[mode]
        rounds = warm + count * per
        if role == "far":
            return self._timed(lambda: self._serve(caller.endpoint, client, rounds))
        if outstanding > 1:
            self._many(caller.endpoint, size, warm, outstanding)
            return self._timed(lambda: self._many(caller.endpoint, size, count, outstanding))
        one_by_one(caller, size, warm, 1)
        return self._timed(lambda: self._keep(one_by_one(caller, size, count, per)))

    def do_bulk(self, role: str, api: str, strategy: str, size: int, touched: bool, count: int, warm: int,
                outstanding: int, mode: str) -> Answer:  # fmt: skip
        """Runs of pages of `size` bytes, announced by near, consumed by far; "ns" until the last was consumed.

        `api` core copies only: the handler is C, and so is what announces.
        """
        if api == "core":
            return self._core_bulk(role, size, touched, count, warm, outstanding, mode)
        (caller, client), how = self._callers[CALLS], Strategy(strategy)
        self._ports[CALLS].spin = SPIN[mode]
        if role == "far":
            client.answer = Consumer(self._region, how, size, touched=touched).answer
            extra = EXTRA if how is Strategy.HANDOVER else 0
            try:
                return self._timed(lambda: self._serve(caller.endpoint, client, warm + count + extra))
            finally:
                client.answer = None
        producer = Producer(self._region, caller.endpoint, how, size, touched=touched, outstanding=outstanding,
                            limit=self._limit)
        producer.transfer(warm)
        answer = self._timed(lambda: producer.transfer(count))
        producer.close()
        return answer

    def do_face(self, role: str, chunk: int, total: int, warm: int) -> Answer:
        """Bytes one way by the stream face, `chunk` at a time, into one buffer; "ns" until the last was received."""
        assert self._stream is not None
        stream, data, into, limit = self._stream, bytes(chunk), memoryview(bytearray(chunk)), self._limit
        send, receive = stream.send, stream.receive_into

        def run(number: int) -> None:
            if role == "near":
                for _ in range(number // chunk):
                    send(data, timeout=limit)
                stream.flush(timeout=limit)
                return
            left = number
            while left:
                got = receive(into, min(chunk, left), timeout=limit)
                if not got:
                    raise NotConnectedError("the stream ended")
                left -= got

        run(warm)
        return self._timed(lambda: run(total))

    def _core_bulk(self, role: str, size: int, touched: bool, count: int, warm: int, outstanding: int,
                   mode: str) -> Answer:  # fmt: skip
        assert self._engine is not None
        core, spin = self._engine[0]._core, int(SPIN[mode] * 1e9)
        if role == "near":
            first, runs, sum_of_one = fill(self._region, size)

            def announce(number: int) -> int:
                return int(lib.idc_loop_announce(core, first, runs, size, sum_of_one if touched else 0, number,
                                                 outstanding, spin, self._deadline()))

            self._check(announce(warm))
            return self._timed(lambda: announce(count))
        part = part_of(self._region, own=False)
        target = ffi.new("uint8_t[]", size)
        with ffi.from_buffer("uint8_t[]", self._region.memory) as pages:
            copier = ffi.new("struct idc_copier *", {"pages": pages, "first": part.offset, "length": part.length,
                                                     "target": target, "room": size, "touched": touched})
            usual, core.handler, core.context = core.handler, ffi.addressof(lib, "idc_handle_copy"), copier
            try:
                return self._timed(lambda: lib.idc_loop_serve(core, warm + count, spin, self._deadline()))
            finally:
                core.handler, core.context = usual, ffi.NULL

    def _core(self, role: str, mode: str, size: int, count: int, per: int, warm: int, outstanding: int) -> Answer:
        assert self._engine is not None
        core, spin = self._engine[0]._core, int(SPIN[mode] * 1e9)
        if role == "far":
            return self._timed(lambda: lib.idc_loop_serve(core, warm + count * per, spin, self._deadline()))
        if outstanding > 1:
            self._check(lib.idc_loop_transact_many(core, size, warm, outstanding, spin, self._deadline()))
            return self._timed(lambda: lib.idc_loop_transact_many(core, size, count, outstanding, spin,
                                                                  self._deadline()))
        return self._ping(lambda view, n: lib.idc_loop_transact(core, size, view, n, per, spin, self._deadline()),
                          count, -(-warm // per))

    def _serve(self, endpoint: Endpoint, client: Server, rounds: int) -> None:
        target, deadline = client.served + rounds, time.monotonic() + self._limit
        while client.served < target:
            if not endpoint.pump(1.0):
                _still_there(endpoint, deadline)

    def _many(self, endpoint: Endpoint, size: int, count: int, outstanding: int) -> None:
        parameters, sent, done = bytes(size), 0, 0
        deadline = time.monotonic() + self._limit

        def completed(completion: Completion) -> None:
            nonlocal done
            if completion.result is not Result.OK:
                raise NotConnectedError(completion.reason)
            done += 1

        while done < count:
            while sent < count and sent - done < outstanding:
                if endpoint.submit_transaction(parameters, completed, notify=False) is not Result.OK:
                    raise MisuseError(f"{outstanding} outstanding are more than the quotas allow")
                sent += 1
            if not endpoint.pump(1.0):
                _still_there(endpoint, deadline)


def one_by_one(caller: Caller, size: int, count: int, per: int) -> array[int]:
    """`count` samples, each the mean of `per` transactions of `size` bytes."""
    parameters, transact, now = bytes(size), caller.transact, time.monotonic_ns
    samples = array("Q", bytes(8 * count))
    before = now()
    for index in range(count):
        for _ in range(per):
            transact(parameters)
        after = now()
        samples[index] = (after - before) // per
        before = after
    return samples


def _still_there(endpoint: Endpoint, deadline: float) -> None:
    if endpoint.state is not State.CONNECTED:
        raise NotConnectedError(f"the connection was lost: {endpoint.reason}")
    if time.monotonic() > deadline:
        raise TimedOutError("the other end did not do its part in time")


def _nothing() -> None:
    """The region stays open: it is the worker's."""
