"""A queue: an endpoint that a thread drives, and in its loop, in C, descriptors whose data go through it.

    queue = Queue("queue-0", shape, depth=64, accepts=Quotas(64, 0, 240, 0), told=bell)
    queue.start(open_port("ivshmem:dev-net-01/queue-0"))
    ...                                   # its thread connects, moves data, and connects again when the peer returns
    queue.stop()                          # joined, its endpoint destroyed

Whoever has the queue never touches its endpoint while the thread runs: `connected`, `reason` and the counters may be
read at any time, and `told` is called, in the thread, when one of the first two has changed. The life of a connection
is the endpoint's (docs/idc.md); what it means for the data is the shape's. Depends on idc._core, idc.endpoint and
idc.transport.shared.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Protocol

from idc._core import ffi
from idc.endpoint import Client, State
from idc.endpoint.engine import Engine
from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc._core import Pointer
    from idc.endpoint import Completion, Endpoint, IncomingTransaction, Quotas
    from idc.transport.shared import SharedPort

#: Longest call into C, seconds: nothing depends on it.
CALL: Final = 5.0
#: Longest sleep while there is no connection, seconds: as the drivers' own.
NAP: Final = 0.5


class Shape(Protocol):
    """What moves a class's data. All of it is called in the queue's thread, but `attach` and `close`.

    Attributes:
        handler: the `idc_handler` that answers the peer's requests; NULL: `judge` sees all of them. Its context is the
            pump.
    """

    handler: Pointer

    def attach(self, pump: Pointer) -> None:
        """Fill in the pump's functions, context and descriptors. Once, before anything else."""

    def begin(self, pump: Pointer) -> None:
        """A connection has begun: nothing is in flight. Raises OSError."""

    def completed(self, cookie: int, completion: Completion) -> None:
        """A request that C has left to Python, or whose outcome is unknown since its connection is over."""

    def end(self) -> None:
        """The connection is over, and all of it completed."""

    def judge(self, transaction: IncomingTransaction) -> str:
        """A request that the handler did not take: what rule of the class it breaks, or empty if it is completed."""

    def close(self) -> None:
        """Let go of memory. Idempotent."""


@dataclass(frozen=True)
class Counters:
    """What a queue has done so far: see struct idc_pump_counters in idc/pump/pump.h."""

    turns: int
    frames: int
    moved: int
    sleeps: int
    wakeups: int
    spins: int
    spins_won: int
    late: int
    holds: int
    unheld: int
    yielded: int
    doorbells: int


class Queue(Client):
    """One queue of this end.

    Args:
        name: for messages.
        shape: what moves the data; closed with the queue.
        depth: own requests outstanding at a time.
        accepts: what the peer may do.
        told: called in the queue's thread when `connected`, `reason` or `error` has changed; must not block.
        poll: seconds that it polls after it last had something to do; 0: as long as that has paid of late.

    Attributes:
        connected: whether data flow.
        reason: why the last connection ended, in words.
        error: what ended the thread, if it was not `stop`.
        connections: how many there were.
    """

    def __init__(self, name: str, shape: Shape, *, depth: int, accepts: Quotas, told: Callable[[], None],
                 poll: float = 0.0) -> None:
        self.name = name
        self.connected = False
        self.reason = ""
        self.error: Exception | None = None
        self.connections = 0
        self._shape = shape
        self._told = told
        self._pump = ffi.new("struct idc_pump *", {"stop_fd": -1, "poll_ns": int(poll * 1e9)})
        shape.attach(self._pump)
        self._engine = Engine(depth, accepts, handler=shape.handler, context=self._pump, messages=0, pump=self._pump)
        self._endpoint: Endpoint | None = None
        self._thread: threading.Thread | None = None
        self._stop = -1

    # -- whoever has it

    def start(self, port: SharedPort) -> None:
        """Drive an endpoint at that port, which is closed with it. Raises MisuseError if it runs."""
        if self._thread is not None:
            raise MisuseError(f"{self.name} runs already")
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._pump.stop_fd = self._stop
        self._pump.processors = 0  # what it knows of the last thread's policy is not so of the next
        self._endpoint = self._engine.endpoint(port, self)
        self._thread = threading.Thread(target=self._run, args=(self._endpoint,), name=self.name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End: the peer is told, the thread joined, everything let go. Idempotent."""
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            self._thread = None
            self._pump.stop_fd = -1
            os.close(self._stop)
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            endpoint.disconnect("the queue was stopped")  # in this thread: only now is it nobody else's
        self._shape.close()
        if endpoint is not None:
            endpoint.abandon()  # which lets go of the region, after all who used it

    @property
    def counters(self) -> Counters:
        """A copy."""
        count = self._pump.count_of
        return Counters(**{name: int(getattr(count, name)) for name in Counters.__dataclass_fields__})

    def told_of(self) -> dict[str, object]:
        """For who looks on: the counters, how often it was connected, how long it was told to poll, seconds."""
        return {**asdict(self.counters), "connections": self.connections, "poll": self._pump.poll_ns / 1e9}

    # -- its thread

    def _run(self, endpoint: Endpoint) -> None:
        poller = select.poll()
        poller.register(self._stop, select.POLLIN)
        try:
            poller.register(endpoint.fileno(), select.POLLIN)
            while not self._stopped():
                if endpoint.state is State.CONNECTED:
                    self._move()
                elif not endpoint.pump(0.0) and endpoint.arm():
                    patience = endpoint.patience
                    poller.poll(1000 * (NAP if patience is None else min(patience, NAP)))
        except Exception as error:
            # Whatever it is ends this queue, and is its owner's to judge.
            self.error = error
            self._say(connected=False, reason=f"{type(error).__name__}: {error}")

    def _move(self) -> None:
        for cookie, completion in self._engine.poll(CALL):
            self._shape.completed(cookie, completion)
        if (code := self._pump.error) > 0:
            raise OSError(code, f"{self.name}: {os.strerror(code)}")

    def _stopped(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._stop)
            return True
        return False

    def _say(self, *, connected: bool, reason: str) -> None:
        self.connected, self.reason = connected, reason
        self._told()

    def _deliver(self) -> None:
        """What was in flight when the connection ended."""
        lost, self._engine.completed = self._engine.completed, []
        for cookie, completion in lost:
            self._shape.completed(cookie, completion)

    # -- its endpoint's client

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`."""
        self.connections += 1
        self._shape.begin(self._pump)
        self._say(connected=True, reason="")

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`."""
        self._deliver()
        self._shape.end()
        self._say(connected=False, reason=endpoint.reason)
        done()

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`: what the handler left."""
        why = self._shape.judge(transaction)
        if why:
            endpoint.accuse(f"{self.name}: {why}")
            transaction.complete()  # goes nowhere, but is due
