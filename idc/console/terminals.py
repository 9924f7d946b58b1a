"""All terminals of one device, and what is asked of them. Depends on idc.console and idc.endpoint.

The client of the endpoint to the driver of the device's back end, whose word on sessions it takes: which session a
request is of. Nothing here waits; `idc.console.server` is the loop around it.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from idc.console import protocol
from idc.console.protocol import ConsoleError, Fault, Op, Opened, Request
from idc.console.terminal import GRACE, Session, Terminal
from idc.endpoint import Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from idc.endpoint import Endpoint, IncomingTransaction

#: Most sessions of a device: several of each terminal.
SESSIONS: Final = 64
#: Seconds until a terminal is looked at again that no process had open.
HUNG: Final = 0.1
#: What the environment of a program has of that of its parent.
_ENVIRONMENT: Final = ("HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER")


class Terminals(Client):
    """See the module's text.

    Args:
        command: what runs in each.
        most: of them, at a time.
        scrollback: bytes of output kept for whoever attaches.
        clock: seconds, never going back.

    Attributes:
        all: by number.
    """

    def __init__(self, command: Sequence[str], most: int, scrollback: int, clock: Callable[[], float]) -> None:
        self.all: dict[int, Terminal] = {}
        self._command = command
        self._most = most
        self._scrollback = scrollback
        self._clock = clock
        self._unhang_at = 0.0
        self._ending: list[Terminal] = []  # hung up, and their programs have not ended yet

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        """See `Client`."""
        try:
            request = protocol.parse(transaction.parameters)
            self._do(request, transaction)
        except ConsoleError as error:
            transaction.complete(str(error).encode()[:512], error.fault)

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        """See `Client`. Sessions stay, and wait to be heard of again."""
        for terminal in self.all.values():
            for session in terminal.sessions.values():
                self._part(session)
        done()

    def running(self) -> Iterator[Terminal]:
        """Those whose programs have not ended, also those that were hung up."""
        for terminal in (*self.all.values(), *self._ending):
            if terminal.code is None:
                yield terminal

    def look(self) -> None:
        """What is due by time, or by what has ended."""
        now = self._clock()
        unhang = now >= self._unhang_at
        if unhang:
            self._unhang_at = now + HUNG
        for terminal in tuple(self.all.values()):
            terminal.hung = terminal.hung and not unhang
            if terminal.code is not None and terminal.hungry:
                terminal.take()  # nothing that is polled says that there is no more
            for session in terminal.sessions.values():
                session.lapsed = session.parted is not None and now - session.parted >= GRACE
            if terminal.seen and all(session.lapsed for session in terminal.sessions.values()):
                del self.all[terminal.number]
        self._ending = [terminal for terminal in self._ending if terminal.code is None]

    def hang_up(self) -> None:
        """End them all: every program gets SIGHUP."""
        for terminal in tuple(self.all.values()):
            self._hang_up(terminal)

    # -- within

    def _do(self, request: Request, transaction: IncomingTransaction) -> None:
        op = request.op
        if op is Op.LIST:
            transaction.complete(self._list())
        elif op in (Op.OPEN, Op.ATTACH):
            transaction.complete(self._attach(request).pack())
        elif op is Op.CLOSE:
            self._hang_up(self._named(request.name))
            transaction.complete()
        elif op in (Op.DETACH, Op.PART):
            with contextlib.suppress(ConsoleError):  # as good as done
                terminal, session = self._session(request.session)
                if op is Op.PART:
                    self._part(session)
                else:
                    terminal.detach(session.id)
            transaction.complete()
        else:
            terminal, session = self._session(request.session)
            session.parted, session.lapsed = None, False
            if op is Op.READ:
                terminal.read(session, request.at, transaction)
            elif op is Op.WRITE:
                terminal.write(session, request.at, request.data, transaction)
            else:
                terminal.resize(request.size, draw=False)
                transaction.complete()

    def _attach(self, request: Request) -> Opened:
        try:
            terminal, session = self._session(request.session)  # asked again, after a lost connection
        except ConsoleError:
            self._make_room_for_session()
            terminal = self._open(request) if request.op is Op.OPEN else self._named(request.name)
            session = terminal.attach(request.session)
            terminal.resize(request.size, draw=request.op is Op.ATTACH)
        session.parted, session.lapsed = None, False
        return Opened(terminal.number, session.position, terminal.output.end)

    def _open(self, request: Request) -> Terminal:
        if any(terminal.name == request.name for terminal in self.all.values() if request.name):
            raise ConsoleError(Fault.TAKEN, f"there is a terminal {request.name!r} already: attach to it, or take "
                                            "another name")
        if len(self.all) >= self._most:
            self._make_room()
        number = next(number for number in range(self._most) if number not in self.all)
        inherited = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            terminal = Terminal(number, request.name, self._command, inherited | {"TERM": request.term}, request.size,
                                self._scrollback)
        except OSError as error:
            raise ConsoleError(Fault.TOO_MANY, f"no more terminals here: {error.strerror}") from error
        self.all[number] = terminal
        return terminal

    def _make_room(self) -> None:
        """Forget a terminal whose program has ended, though nobody has seen that. Raises ConsoleError."""
        over = [terminal for terminal in self.all.values() if terminal.code is not None and not terminal.sessions]
        if not over:
            raise ConsoleError(Fault.TOO_MANY, f"there are {self._most} terminals already, which is the most of this "
                                               "device; close one, or attach the device with more")
        over[0].close()
        del self.all[over[0].number]

    def _make_room_for_session(self) -> None:
        """Forget one that is not heard of any more, if there must be room. Raises ConsoleError."""
        there = [(terminal, session) for terminal in self.all.values() for session in terminal.sessions.values()]
        if len(there) < SESSIONS:
            return
        for terminal, session in there:
            if session.lapsed:
                terminal.detach(session.id)
                return
        raise ConsoleError(Fault.TOO_MANY, f"{SESSIONS} are attached to terminals here, which is the most; detach one")

    def _named(self, name: str) -> Terminal:
        for terminal in self.all.values():
            if name in (terminal.name, str(terminal.number)) and name:
                return terminal
        there = ", ".join(f"{t.number} {t.name}".strip() for t in self.all.values())
        raise ConsoleError(Fault.NO_SUCH, f"there is no terminal {name!r} (there are: {there or 'none'})")

    def _session(self, id_: int) -> tuple[Terminal, Session]:
        for terminal in self.all.values():
            if id_ in terminal.sessions:
                return terminal, terminal.sessions[id_]
        raise ConsoleError(Fault.GONE, "the terminal is gone: it was closed, or the process that had it has died")

    def _part(self, session: Session) -> None:
        session.let_go()
        if session.parted is None:
            session.parted = self._clock()

    def _hang_up(self, terminal: Terminal) -> None:
        terminal.hang_up()
        for session in tuple(terminal.sessions):
            terminal.detach(session)
        del self.all[terminal.number]
        if terminal.code is None:
            self._ending.append(terminal)

    def _list(self) -> bytes:
        return protocol.pack_list([
            {"number": terminal.number, "name": terminal.name, "command": " ".join(terminal.command)[:64],
             "rows": terminal.size.rows, "columns": terminal.size.columns,
             "attached": sum(session.parted is None for session in terminal.sessions.values()),
             "code": terminal.code} for terminal in self.all.values()])
