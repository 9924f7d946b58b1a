"""The process that has the terminals of a device, so that they outlive the drivers of their domain.

    python3 -m idc.console.server --socket PATH --lock FD --terminals N --scrollback BYTES -- COMMAND...

The driver of the device's back end starts it, and connects to the Unix socket at PATH (0600); the newest connection
counts. While no driver is there its programs go on. SIGTERM hangs them all up, and ends it once they have ended, or
after a while; without programs and driver it ends by itself. FD is a lock that shows that it lives. Depends on
idc.console.terminals and idc.endpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idc.console.service import ALL, resources
from idc.console.terminals import Terminals
from idc.endpoint import Endpoint, State
from idc.transport.unix import AcceptedPort, listen

if TYPE_CHECKING:
    from types import FrameType

#: Longest sleep, seconds: what is due by time is due that late.
NAP: Final = 0.25
#: Seconds without driver and programs after which it ends.
IDLE: Final = 60.0
#: Seconds that programs have to end after SIGHUP, before SIGKILL.
FAREWELL: Final = 3.0

log = logging.getLogger("idc.console")


class Server:
    """See the module's text. Raises OSError if it cannot listen."""

    def __init__(self, path: Path, terminals: Terminals) -> None:
        self._terminals = terminals
        self._listener = listen(path, 4)
        self._driver: Endpoint | None = None
        self._met = False
        self._stopped = False
        self._idle_since = time.monotonic()
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._stop)

    def run(self) -> None:
        """Until SIGTERM, or nobody needs it any more."""
        while not self._stopped and time.monotonic() - self._idle_since < IDLE:
            if not self._work():
                self._wait()
            if self._driver is not None or any(True for _ in self._terminals.running()):
                self._idle_since = time.monotonic()

    def close(self) -> None:
        """Hang up all terminals, wait for their programs, kill those that do not end."""
        self._terminals.hang_up()
        if self._driver is not None:
            self._driver.abandon()
        self._listener.close()
        deadline = time.monotonic() + FAREWELL
        for terminal in self._terminals.running():
            poller = select.poll()
            poller.register(terminal.exited, select.POLLIN)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                terminal.kill()
            terminal.reap()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True

    def _work(self) -> bool:
        """Whether the driver's endpoint did anything."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            connection, _ = self._listener.accept()
            if self._driver is not None:
                self._driver.abandon()
            self._driver = Endpoint(AcceptedPort(connection), self._terminals, resources(ALL), "the driver")
            self._met = False
        self._terminals.look()
        driver = self._driver
        if driver is None:
            return False
        busy = driver.pump(0.0)
        self._met |= driver.state is not State.ABSENT
        if self._met and driver.state is State.ABSENT:
            driver.abandon()
            self._driver = None
        return busy

    def _wait(self) -> None:
        """Sleep until something is to be done, and do what terminals ask for."""
        poller, nap = select.poll(), NAP
        poller.register(self._listener, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        if self._driver is not None:
            if not self._driver.arm():
                nap = 0.0
            elif (patience := self._driver.patience) is not None:
                nap = min(nap, patience)
            poller.register(self._driver.fileno(), select.POLLIN)
        masters, exits = {}, {}
        for terminal in self._terminals.all.values():
            events = (select.POLLIN if terminal.hungry else 0) | (select.POLLOUT if terminal.typed else 0)
            if events:  # else not at all: poll tells of a terminal that nobody has open whether it is asked or not
                poller.register(terminal.master, events)
                masters[terminal.master] = terminal
        for terminal in self._terminals.running():
            poller.register(terminal.exited, select.POLLIN)
            exits[terminal.exited] = terminal
        for fd, events in poller.poll(nap * 1000):
            if fd in exits:
                exits[fd].reap()
            elif fd in masters:
                if events & select.POLLOUT:
                    masters[fd].give()
                if events & (select.POLLIN | select.POLLHUP):
                    masters[fd].take()
            elif fd == self._wake:
                os.read(fd, 64)


def main() -> int:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="idc.console.server", description="terminals of one device")
    parser.add_argument("--socket", type=Path, required=True, metavar="PATH")
    parser.add_argument("--lock", type=int, required=True, metavar="FD")
    parser.add_argument("--terminals", type=int, required=True, metavar="N")
    parser.add_argument("--scrollback", type=int, required=True, metavar="BYTES")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="terminals: %(message)s", stream=sys.stderr)
    os.set_inheritable(args.lock, False)
    server = Server(args.socket, Terminals(args.command, args.terminals, args.scrollback, time.monotonic))
    try:
        server.run()
    finally:
        server.close()
        with contextlib.suppress(OSError):
            args.socket.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
