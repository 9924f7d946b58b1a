"""The device class "console": its two drivers pass requests on, and have neither terminals nor sessions.

    program ⇄ front end ══ region ══ back end ⇄ the process with the terminals (idc.console.server)

So either can be killed, and what a terminal runs goes on: a program asks again what was not answered. Depends on
idc.console and idc.device.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, ClassVar, Final

from idc.console import protocol
from idc.console.protocol import ConsoleError, Fault, Op, Request
from idc.console.service import ALL, PROGRAMS, REQUESTS, quotas, resources
from idc.device import BackDriver, Device, DeviceClass, Option
from idc.device.driver import SocketFront
from idc.domain import Service
from idc.endpoint import Client, Completion, Endpoint, IncomingTransaction, Resources, Result, State
from idc.errors import MisuseError
from idc.transport.unix import UnixPort

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

#: Seconds between two starts of the process with the terminals, if it does not stay.
START: Final = 1.0
#: How often it is started in a row, before this end gives up for a while.
STARTS: Final = 4


class ConsoleFront(SocketFront):
    """Programs' requests go to the other side; that is told when a program is gone, so that nothing waits for it."""

    most = PROGRAMS

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._sessions: dict[object, int] = {}
        self._gone: deque[int] = deque()

    def resources(self) -> Resources:
        """See `SocketFront`. So small that the device has a slot for each request of every program."""
        return resources(REQUESTS)

    def asked(self, program: object, parameters: bytes) -> None:
        """See `SocketFront`."""
        with contextlib.suppress(ConsoleError):  # the other side will say so
            self._sessions[program] = protocol.parse(parameters).session

    def left(self, program: object) -> None:
        """See `SocketFront`."""
        if (session := self._sessions.pop(program, None)) is not None:
            self._gone.append(session)

    def work(self) -> bool:
        """See `Driver`."""
        busy = super().work()
        while self._gone and self.endpoint is not None:
            if self.endpoint.submit_transaction(Request(Op.PART, self._gone[0]).pack()) is Result.BACK_PRESSURED:
                break
            self._gone.popleft()
            busy = True
        return busy

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`. The other side parts all sessions by itself."""
        self._sessions.clear()
        self._gone.clear()
        super().disconnect(endpoint, done)


class ConsoleBack(BackDriver):
    """Passes requests on to the process that has the terminals, and starts that if it is not there.

    Raises MisuseError for a command that is none.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._options = device.options
        self._command = _words(str(device.options["command"]))
        self._path = device.sockets / f"terminals-{device.peer}-{device.number}"
        self._waiting: deque[IncomingTransaction] = deque()
        self._starts = 0
        self._start_at = 0.0
        self._link = Endpoint(UnixPort(str(self._path)), Client(), resources(ALL), "the terminals")

    def endpoints(self) -> Sequence[Endpoint]:
        """See `Driver`."""
        return (*super().endpoints(), self._link)

    def work(self) -> bool:
        """See `Driver`. Raises OSError if the process with the terminals does not stay."""
        if self._link.state is State.CONNECTED:
            self._starts = 0
        elif (now := time.monotonic()) >= self._start_at and (lock := _lock(self._path)) >= 0:
            try:
                if self._starts >= STARTS:
                    raise OSError("the process with the terminals does not stay; the log of the drivers says why")
                self._starts, self._start_at = self._starts + 1, now + START
                self._start(lock)
            finally:
                os.close(lock)
        return self._flush()

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`."""
        self._waiting.append(transaction)
        self._flush()

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`. What the terminals have not answered is completed with it, and goes nowhere."""
        while self._waiting:
            self._waiting.popleft().complete()
        self._link.disconnect("the front end is gone")
        done()

    def close(self) -> None:
        """See `Driver`. With the device its programs end; if drivers are only unloaded they stay."""
        if self.gone:
            self._hang_up()
        super().close()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:  # where nobody is, nothing runs
            probe.settimeout(1.0)  # of a process that is stopped nobody should wait long
            probe.connect(str(self._path))
            process, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            os.kill(process, signal.SIGTERM)

    def drop(self) -> None:
        """See `Driver`. The terminals stay."""
        self._link.abandon()
        super().drop()

    def _flush(self) -> bool:
        busy = False
        while self._waiting:
            transaction = self._waiting[0]
            if self._link.submit_transaction(transaction.parameters, _answer(transaction)) is not Result.OK:
                break
            self._waiting.popleft()
            busy = True
        return busy

    def _start(self, lock: int) -> None:
        """In the background and in a session of its own, so that it is nobody's child when this process ends."""
        words = [sys.executable, "-m", "idc.console.server", "--socket", str(self._path), "--lock", str(lock),
                 "--terminals", str(self._options["terminals"]), "--scrollback", str(self._options["scrollback"]),
                 "--", *self._command]
        subprocess.run(["/bin/sh", "-c", '"$@" &', "sh", *words], stdin=subprocess.DEVNULL, pass_fds=[lock],
                       start_new_session=True, check=True)


class Console(DeviceClass):
    """Terminals of the back end's domain, used in the front end's"""

    name = "console"
    service = Service("console", quotas(ALL), ALL)
    options: ClassVar[Mapping[str, Option]] = {
        "command": Option("/bin/sh -l", "what runs in each terminal: a program and its arguments"),
        "terminals": Option(16, "most of them at a time", least=1, most=protocol.MOST_TERMINALS),
        "scrollback": Option(64 << 10, "bytes of output shown to whoever attaches later", least=0, most=1 << 20),
    }
    front = ConsoleFront
    back = ConsoleBack


def _answer(transaction: IncomingTransaction) -> Callable[[Completion], None]:
    def answered(completion: Completion) -> None:
        if completion.result is Result.OK:
            transaction.complete(completion.status, completion.error)
        elif completion.result is Result.ERROR:
            transaction.fail(completion.reason)
        else:
            transaction.complete(b"the terminals were away", Fault.AGAIN)

    return answered


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise MisuseError(f"option command: {command!r}: {error}") from None
    if not words:
        raise MisuseError("option command: it is empty")
    return words


def _lock(path: Path) -> int:
    """The lock beside a socket, which the process with those terminals inherits and holds as long as it lives: -1 if
    there is one.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return -1
    return lock
