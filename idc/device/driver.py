"""Drivers: what a device class brings for each end. Each is the client of its end's endpoint, see docs/idc.md.

    class EchoBack(BackDriver):
        def transaction(self, endpoint, transaction):
            transaction.complete(transaction.parameters)

A front end's driver is by default `SocketFront`: programs of the same domain reach the device by a Unix socket there.
Depends on idc.device.options and states, idc.endpoint, idc.transport.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Resources, Result, State
from idc.transport.address import open_port
from idc.transport.unix import AcceptedPort, listen

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from idc.device.classes import Queues
    from idc.device.options import Value
    from idc.device.states import Role
    from idc.domain import Service

#: Where the sockets of front ends are, in a VM.
SOCKETS: Final = Path("/run/idc")
#: Programs that are connected to one device at a time; more wait.
PROGRAMS: Final = 32


@dataclass(frozen=True, slots=True)
class Device:
    """What a driver is told of the device that it drives.

    Attributes:
        kind: name of the class.
        number: tells it from others of the class with the same front end.
        role: which end this is.
        here, peer: names of the domains at the two ends, as the host says.
        options: all of them, checked.
        service: of the class.
        channel: of the region that its endpoint uses.
        sockets: where sockets for programs of this domain go.
        queues: of the class with these options, if it has any.
    """

    kind: str
    number: str
    role: Role
    here: str
    peer: str
    options: Mapping[str, Value]
    service: Service
    channel: str
    sockets: Path
    queues: Queues | None = None

    def __str__(self) -> str:
        return f"{self.kind}-{self.number}"


class Driver(Client):
    """One end of one device, made when the device is attached, and again after it failed.

    Whatever a method of it raises ends this end, which is tried again after a pause.

    Attributes:
        device: what it drives.
        endpoint: to the other end while the region is open, else None.
        gone: set before `close`: the device is detached; else its drivers are unloaded, and may be back soon.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.gone = False
        self.endpoint: Endpoint | None = None

    def open(self, address: str) -> None:
        """Take ring and event channel at that address. Raises OSError, IdcError."""
        port = open_port(address)
        try:
            self.endpoint = Endpoint(port, self, self.device.service.resources(), self.device.peer)
        except BaseException:
            port.close()
            raise

    def close(self) -> None:
        """End what was opened; `opened` says when it is over."""
        if self.endpoint is not None:
            self.endpoint.destroy()

    def drop(self) -> None:
        """End at once whatever is left. Idempotent."""
        if self.endpoint is not None:
            self.endpoint.abandon()

    @property
    def opened(self) -> bool:
        """Whether it holds the region."""
        return self.endpoint is not None and self.endpoint.state is not State.DESTROYED

    @property
    def connected(self) -> bool:
        """Whether the two ends have met."""
        return self.endpoint is not None and self.endpoint.state is State.CONNECTED

    @property
    def reason(self) -> str:
        """Why they were parted last."""
        return "" if self.endpoint is None else self.endpoint.reason

    def endpoints(self) -> Sequence[Endpoint]:
        """Those to be driven."""
        return () if self.endpoint is None else (self.endpoint,)

    def fds(self) -> Sequence[int]:
        """Descriptors that are readable when `work` has something to do."""
        return ()

    def work(self) -> bool:
        """Do what is due besides the endpoints, without waiting. Whether there was anything."""
        return False


class BackDriver(Driver):
    """The end that serves."""


class FrontDriver(Driver):
    """The end that asks."""


class SocketFront(FrontDriver):
    """Passes transactions and messages of programs of its domain on to the device.

    A program connects to `unix:SOCKETS/CLASS-NUMBER` with endpoints like any other. Its connection stands while the
    device's does: it is not connected before, and what it has under way when the device's connection is lost completes
    with *outcome unknown* there too. Who may connect is decided by the permissions of the path, 0600.

    Attributes:
        most: programs that are connected at a time; more wait.
    """

    most: ClassVar[int] = PROGRAMS

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._path = device.sockets / str(device)
        self._listener = listen(self._path, PROGRAMS)
        self._programs: list[_Program] = []

    def resources(self) -> Resources:
        """Of one program's connection."""
        return self.device.service.resources()

    def asked(self, program: object, parameters: bytes) -> None:
        """A program's transaction is about to be passed on."""

    def left(self, program: object) -> None:
        """A program is gone, and the device's connection stands."""

    def endpoints(self) -> Sequence[Endpoint]:
        """See `Driver`."""
        return (*super().endpoints(), *(program.endpoint for program in self._programs))

    def fds(self) -> Sequence[int]:
        """See `Driver`."""
        return (self._listener.fileno(),) if self._open_to_all else ()

    @property
    def _open_to_all(self) -> bool:
        return self.connected and len(self._programs) < self.most

    def work(self) -> bool:
        """See `Driver`."""
        busy = False
        while self._open_to_all:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionError):
                break
            self._programs.append(_Program(self, connection))
            busy = True
        for program in tuple(self._programs):
            busy |= program.flush()
            if program.met and program.endpoint.state is State.ABSENT:
                program.endpoint.abandon()
                self._programs.remove(program)
                self.left(program)
                busy = True
        return busy

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`. Programs are disconnected as the device is."""
        self._part()
        done()

    def drop(self) -> None:
        """See `Driver`."""
        super().drop()
        self._part()
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _part(self) -> None:
        programs, self._programs = self._programs, []
        for program in programs:
            program.endpoint.abandon()


class _Program(Client):
    """One program's connection."""

    def __init__(self, front: SocketFront, connection: socket.socket) -> None:
        self._front = front
        self._waiting: deque[IncomingTransaction | IncomingMessage] = deque()
        self.met = False
        self.endpoint = Endpoint(AcceptedPort(connection), self, front.resources(), "a program")

    def appear(self, endpoint: Endpoint) -> None:
        self.met = True

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self._front.asked(self, transaction.parameters)
        self._waiting.append(transaction)
        self.flush()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self._waiting.append(message)
        self.flush()

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        while self._waiting:
            item = self._waiting.popleft()
            item.complete()  # goes nowhere, but is due
        done()

    def flush(self) -> bool:
        """Pass on what waits, in order, as far as the device takes it."""
        device, busy = self._front.endpoint, False
        while self._waiting and device is not None:
            item = self._waiting[0]
            submit = device.submit_transaction if isinstance(item, IncomingTransaction) else device.submit_message
            body = item.parameters if isinstance(item, IncomingTransaction) else item.body
            if submit(body, self._answer(item)) is not Result.OK:
                break
            self._waiting.popleft()
            busy = True
        return busy

    def _answer(self, item: IncomingTransaction | IncomingMessage) -> Callable[[Completion], None]:
        def answered(completion: Completion) -> None:
            if completion.result not in (Result.OK, Result.ERROR):
                self.endpoint.abandon()  # so that the outcome is unknown to the program too
            elif isinstance(item, IncomingMessage):
                item.complete()
            elif completion.result is Result.OK:
                item.complete(completion.status, completion.error)
            else:
                item.fail(completion.reason)

        return answered
