"""An attachment to a terminal of another domain, for whoever drives it: bytes in and out, that survive the connection.

    with Attachment(open_port("unix:/run/idc/console-0"), "work") as terminal:
        terminal.write(b"make\\r")
        while not terminal.over:
            sys.stdout.buffer.write(terminal.read(timeout=1.0))

Whatever has not been answered when the connection is lost is asked again once it is back; positions of bytes see to it
that nothing is doubled. What the other side could not keep meanwhile is counted in `lost`. Depends on idc.console and
idc.endpoint.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Self

from idc.console import protocol
from idc.console.protocol import ConsoleError, Fault, Op, Request, Size
from idc.console.service import REQUESTS, resources
from idc.endpoint import Client, Completion, Endpoint, Result, State
from idc.endpoint.blocking import Caller
from idc.errors import IdcError, OutcomeUnknownError, ProtocolError, TimedOutError, TransactionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.transport.base import Port

#: Bytes that were read ahead of whoever uses them, and that may be waiting to be sent.
AHEAD: Final = 64 << 10
#: Pause before a request is repeated that the other side could not take just then, seconds.
PAUSE: Final = 0.05


class Attachment(Client):
    """One session with one terminal. It belongs to one thread.

    Args:
        port: of the device's socket; closed with this object.
        terminal: name or number of a terminal that is there; None opens a new one.
        name: of the new one; may be empty.
        term: its type, as in TERM.
        size: of the window.

    Attributes:
        number: of the terminal, once attached.
        replay: position of the first byte that was put out after it was attached; what is before was kept.
        lost: bytes of output that were not kept while the connection was away.
        over: nothing more comes: the program has ended, or `error` says why.
        code: how the program ended, as in subprocess; None if it has not, as far as is known.
        error: why it is over, if not by the program's end.
    Raises:
        ConsoleError: the size or the name cannot be.
    """

    def __init__(self, port: Port, terminal: str | None = None, *, name: str = "", term: str = "dumb",
                 size: Size | None = None) -> None:
        self.number = -1
        self.replay = 0
        self.lost = 0
        self.over = False
        self.code: int | None = None
        self.error: IdcError | None = None
        self._session = secrets.randbits(63) + 1
        size = size or Size()
        first = (Request(Op.OPEN, self._session, size, name, term) if terminal is None else
                 Request(Op.ATTACH, self._session, size, terminal))
        try:
            self._first: bytes = first.pack()
        except ConsoleError:
            port.close()
            raise
        self._attached = False
        self._position = 0
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._unsent = bytearray()
        self._sent = 0
        self._size: Size | None = None
        self._under_way: set[Op] = set()
        self._not_before = 0.0
        self.endpoint = Endpoint(port, self, resources(REQUESTS), "the console device")

    # -- what it is for

    @property
    def attached(self) -> bool:
        """Whether the terminal is there, and this its session."""
        return self._attached

    @property
    def position(self) -> int:
        """Of the next byte that `read` returns."""
        return self._position - self._held

    @property
    def full(self) -> bool:
        """Whether `write` should wait."""
        return len(self._unsent) >= AHEAD

    @property
    def unsent(self) -> int:
        """Bytes of input that the program's side has not taken."""
        return len(self._unsent)

    def write(self, data: bytes) -> None:
        """Input for the program. It is kept until its side has taken it: look at `full`."""
        self._unsent += data
        self._submit()

    def resize(self, size: Size) -> None:
        """The window has another size. Raises ConsoleError."""
        size.check()
        self._size = size
        self._submit()

    def take(self) -> bytes:
        """What came so far, without waiting."""
        taken = b"".join(self._pieces)
        self._pieces.clear()
        self._held = 0
        self._submit()
        return taken

    def read(self, timeout: float | None = None) -> bytes:
        """Output, as soon as there is some; b"" once it is over. Raises TimedOutError, and `error` once all is read."""
        self.wait_for(lambda: bool(self._pieces) or self.over, timeout, "no output")
        if not self._pieces and self.error is not None:
            raise self.error
        return self.take()

    def wait_for(self, what: Callable[[], bool], timeout: float | None = None, text: str = "it did not happen") -> None:
        """Drive it until that is so. Raises TimedOutError."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not what():
            nap = 1.0 if deadline is None else deadline - time.monotonic()
            if nap <= 0:
                raise TimedOutError(f"{text} within {timeout:g} s")
            if not self.pump():
                self.sleep(min(nap, 1.0))

    def attach(self, timeout: float | None = None) -> None:
        """Wait until it is. Raises ConsoleError if it is refused, TimedOutError."""
        self.wait_for(lambda: self._attached or self.over, timeout, "the console device did not answer")
        if self.error is not None and not self._attached:
            raise self.error

    def detach(self, timeout: float = 2.0) -> None:
        """Leave the terminal: its program goes on. What was written is sent before, if that can be done in time."""
        with contextlib.suppress(TimedOutError):
            self.wait_for(lambda: self.over or not self._unsent, timeout)
            if self._attached and self.endpoint.state is State.CONNECTED:
                self.over = True  # asks for nothing more
                left: list[Completion] = []
                if self.endpoint.submit_transaction(Request(Op.DETACH, self._session).pack(), left.append) is Result.OK:
                    self.wait_for(lambda: bool(left), timeout)
        self.over = True

    def close(self) -> None:
        """Detach, and let go of everything. Idempotent."""
        if self.endpoint.state is not State.DESTROYED:
            self.detach()
            self.endpoint.destroy()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- driving it

    def pump(self) -> bool:
        """Do what is due, without waiting. Whether there was anything."""
        busy = self.endpoint.pump(0.0)
        self._submit()
        return busy

    def sleep(self, timeout: float, *more: int) -> set[int]:
        """Sleep until there is something to do, or to read from one of the descriptors: those of them."""
        poller, nap = select.poll(), timeout
        if not self.endpoint.arm():
            nap = 0.0
        elif (patience := self.endpoint.patience) is not None:
            nap = min(nap, patience)
        if self._not_before:
            nap = min(nap, max(0.0, self._not_before - time.monotonic()))
        own = self.endpoint.fileno()
        for fd in (own, *more):
            poller.register(fd, select.POLLIN)
        return {fd for fd, _ in poller.poll(nap * 1000) if fd != own}

    def connect(self, endpoint: Endpoint) -> None:
        """See `Client`."""
        self._under_way.clear()
        self._submit()

    # -- within

    def _submit(self) -> None:
        """Ask for all that is wanted and not under way."""
        if self.over or self.endpoint.state is not State.CONNECTED:
            return
        if self._not_before:
            if time.monotonic() < self._not_before:
                return
            self._not_before = 0.0
        if not self._attached:
            self._ask(Op.ATTACH, self._first)
            return
        if self._held < AHEAD:
            self._ask(Op.READ, Request(Op.READ, self._session, at=self._position).pack())
        if self._unsent:
            piece = bytes(self._unsent[:protocol.INPUT_BYTES])
            self._ask(Op.WRITE, Request(Op.WRITE, self._session, at=self._sent, data=piece).pack(), piece)
        if self._size is not None:
            self._ask(Op.RESIZE, Request(Op.RESIZE, self._session, self._size).pack(), self._size)

    def _ask(self, op: Op, parameters: bytes, what: bytes | Size = b"") -> None:
        if op in self._under_way:
            return

        def done(completion: Completion) -> None:
            self._under_way.discard(op)
            if completion.result is Result.OUTCOME_UNKNOWN:
                return  # asked again with the next connection
            try:
                self._answered(op, completion, what)
            except (ConsoleError, ProtocolError) as error:
                self._end(error)
            self._submit()

        if self.endpoint.submit_transaction(parameters, done) is Result.OK:
            self._under_way.add(op)

    def _answered(self, op: Op, completion: Completion, what: bytes | Size) -> None:
        status = completion.status
        if completion.result is not Result.OK:
            raise ProtocolError(f"the console device failed: {completion.reason}")
        if completion.error == Fault.AGAIN:
            self._not_before = time.monotonic() + PAUSE
        elif completion.error == Fault.ENDED:
            self.code, self.over = protocol.parse_code(status), True
        elif completion.error:
            raise protocol.fault(completion.error, status)
        elif op is Op.ATTACH:
            self.number, self._position, self.replay = protocol.parse_opened(status)
            self._attached = True
        elif op is Op.READ:
            self._came(*protocol.parse_output(status))
        elif op is Op.WRITE:
            assert isinstance(what, bytes)
            del self._unsent[:len(what)]
            self._sent += len(what)
        elif self._size == what:
            self._size = None

    def _came(self, at: int, data: bytes) -> None:
        if at < self._position or not data:
            raise ProtocolError(f"{len(data)} bytes of output at {at}, byte {self._position} was asked for")
        self.lost += at - self._position
        self._position = at + len(data)
        self._pieces.append(data)
        self._held += len(data)

    def _end(self, error: IdcError) -> None:
        if not self.over:
            self.over, self.error = True, error


def terminals(port: Port, timeout: float = 10.0) -> list[dict[str, Any]]:
    """Those of a device: number, name, command, rows, columns, attached (how many are), code (None while it runs).

    Raises ConsoleError, TimedOutError, ProtocolError. Closes the port.
    """
    return protocol.parse_list(_call(port, Request(Op.LIST), timeout))


def hang_up(port: Port, terminal: str, timeout: float = 10.0) -> None:
    """End a terminal, by name or number: its program gets SIGHUP. Raises as `terminals`. Closes the port."""
    _call(port, Request(Op.CLOSE, name=terminal), timeout)


def _call(port: Port, request: Request, timeout: float) -> bytes:
    with Caller(port, resources(REQUESTS)) as caller:
        deadline = time.monotonic() + timeout
        while True:
            try:
                return caller.transact(request.pack(), timeout=max(0.0, deadline - time.monotonic()))
            except TransactionError as error:
                if error.code != Fault.AGAIN:
                    raise protocol.fault(error.code, error.status) from None
                time.sleep(PAUSE)
            except OutcomeUnknownError:
                if request.op is not Op.LIST:
                    raise
