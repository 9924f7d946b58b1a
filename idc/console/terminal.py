"""One terminal: a program on a pseudo-terminal, what it put out, and the sessions that are attached to it.

    program ⇄ pseudo-terminal ─▶ Output: WINDOW ahead of the slowest session, else the newest ─▶ READ of each session
                              ◀─ WRITE of each session, completed once the program's side has taken it

Nothing here waits. A session that does not read holds up its own terminal, as a person does who stops the output, and
no other. Depends on idc.console.output and protocol, and on idc.endpoint for what it completes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import termios
from typing import TYPE_CHECKING, Final

from idc.console import protocol
from idc.console.output import Output
from idc.console.protocol import ConsoleError, Fault, Size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from idc.endpoint import IncomingTransaction

#: Bytes that a program may be ahead of a session that reads slowly.
WINDOW: Final = 256 << 10
#: Bytes taken from a pseudo-terminal before another one has its turn, and in one call (the kernel gives 4095).
TURN: Final = 64 << 10
CALL: Final = 16 << 10
#: Seconds for which a session whose connection was lost holds up the program, so that nothing of its output is lost.
GRACE: Final = 30.0
#: Bytes that are read at most after the program has ended: more than a pseudo-terminal holds, so what comes after them
#: is from jobs that it left behind.
REST: Final = 64 << 10
#: Exit code of a program that could not be run, as of a shell.
NOT_RUN: Final = 127
#: Linux: sends a signal to the foreground process group of a pseudo-terminal. Not in the termios module.
_TIOCSIG: Final = 0x40045436


class Session:
    """One attachment of somebody.

    Attributes:
        id: what it calls itself.
        position: of the first byte of output that it has not said to have.
        taken: bytes of input that were taken from it.
        read: a READ that waits for output.
        write, left: a WRITE that waits for the program, and what is left of its data.
        parted: when its connection was lost; None while it stands.
        lapsed: that was so long ago that the program goes on without it.
    """

    def __init__(self, id_: int, position: int) -> None:
        self.id = id_
        self.position = position
        self.taken = 0
        self.read: IncomingTransaction | None = None
        self.write: IncomingTransaction | None = None
        self.left = b""
        self.parted: float | None = None
        self.lapsed = False

    def let_go(self) -> None:
        """Complete what waits: its connection is over, or a newer one asks the same."""
        self.drop_read()
        self.drop_write()

    def drop_read(self) -> None:
        """See `let_go`."""
        read, self.read = self.read, None
        if read is not None:
            read.complete(b"", Fault.AGAIN)

    def drop_write(self) -> None:
        """See `let_go`. What the program has not taken counts as not sent."""
        write, self.write, self.left = self.write, None, b""
        if write is not None:
            write.complete(b"", Fault.AGAIN)


class Terminal:
    """One terminal; its program runs from now on.

    Args:
        number: of it.
        name: of it; may be empty.
        command: program and arguments.
        environment: of the program.
        size: of its window.
        scrollback: bytes of output that are kept for whoever attaches later.

    Attributes:
        sessions: by id.
        code: how its program ended; None while it runs.
        drained: all that it put out has been read.
        hung: no process had the terminal open when it was looked at last, as while login(1) makes it its own.
        seen: somebody was told how it ended.
    Raises:
        OSError: there is no pseudo-terminal left, or no process.
    """

    def __init__(self, number: int, name: str, command: Sequence[str], environment: Mapping[str, str], size: Size,
                 scrollback: int) -> None:
        self.number = number
        self.name = name
        self.command = command
        self.size = size
        self.sessions: dict[int, Session] = {}
        self.code: int | None = None
        self.drained = False
        self.hung = False
        self.seen = False
        self.output = Output()
        self._scrollback = scrollback
        self._rest = REST
        self._master, self._slave = os.openpty()  # the slave stays open here, so that nothing is lost at an exit
        try:
            os.set_blocking(self._master, False)
            self._set(size)
            self._pid = os.fork()
            if not self._pid:
                _become(command, environment, self._slave)
            self.exited = os.pidfd_open(self._pid)
        except BaseException:
            self.close()
            raise

    # -- what the poll loop asks

    @property
    def master(self) -> int:
        """The pseudo-terminal; -1 once it is closed."""
        return self._master

    @property
    def hungry(self) -> bool:
        """Whether more output would be taken now."""
        return self._master >= 0 and not self.drained and not self.hung and self.output.end - self._slowest < WINDOW

    @property
    def typed(self) -> bool:
        """Whether there is input for the program."""
        return self._master >= 0 and any(session.left for session in self.sessions.values())

    # -- its two sides

    def take(self) -> None:
        """Read what the program put out, as much as there is room and turn for, and pass it on."""
        taken = 0
        while self.hungry and taken < TURN:
            try:
                data = os.read(self._master, CALL)
            except BlockingIOError:
                self.drained = self.code is not None  # what jobs that it left behind say later, nobody waits for
                break
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                self.hung, self.drained = True, self.code is not None
                break
            taken += len(data)
            self.output.append(data)
            self._trim()
            if self.code is not None:
                self._rest -= len(data)
                self.drained = self._rest <= 0
        if self.drained:
            self.close()
        self.serve()

    def give(self) -> None:
        """Pass input on, as much as the program's side takes."""
        for session in self.sessions.values():
            while session.left and self._master >= 0:
                try:
                    done = os.write(self._master, session.left)
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    done = len(session.left)  # its program has ended: nobody reads that any more
                session.taken += done
                session.left = session.left[done:]
            if not session.left and session.write is not None:
                write, session.write = session.write, None
                write.complete()

    def serve(self) -> None:
        """Answer those sessions that wait and for which there is something."""
        for session in self.sessions.values():
            if session.read is None:
                continue
            at, data = self.output.read(session.position, protocol.OUTPUT_BYTES)
            if data:
                read, session.read = session.read, None
                read.complete(protocol.pack_output(at, data))
            elif self.drained and self.code is not None:
                read, session.read = session.read, None
                self.seen = True
                read.complete(protocol.pack_code(self.code), Fault.ENDED)
        self._trim()

    def reap(self) -> None:
        """Take note that the program has ended."""
        if self.code is None:
            _, status = os.waitpid(self._pid, 0)
            self.code = os.waitstatus_to_exitcode(status)
            os.close(self.exited)
            self.exited = -1
            self.take()

    def resize(self, size: Size, *, draw: bool) -> None:
        """Give the window a size; with `draw` the program is told even if it had that, so that it draws it anew."""
        if self._master < 0:
            return
        same, self.size = size == self.size, size
        self._set(size)
        if same and draw:
            with contextlib.suppress(OSError):  # no process has the terminal open
                fcntl.ioctl(self._master, _TIOCSIG, signal.SIGWINCH)

    def hang_up(self) -> None:
        """Close the terminal: its program gets SIGHUP, and counts as ended once it has."""
        self.drained = True
        self.close()

    def kill(self) -> None:
        """End a program that does not heed SIGHUP, with the jobs of its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)

    def close(self) -> None:
        """Close the pseudo-terminal; idempotent."""
        for fd in (self._master, self._slave):
            if fd >= 0:
                os.close(fd)
        self._master = self._slave = -1
        for session in self.sessions.values():
            session.drop_write()

    # -- sessions

    def attach(self, id_: int) -> Session:
        """A new session, which is shown what is kept. The same again if it has one."""
        session = self.sessions.get(id_)
        if session is None:
            begin = max(self.output.start, self.output.end - self._scrollback)
            session = self.sessions[id_] = Session(id_, begin)
        return session

    def detach(self, id_: int) -> None:
        """End a session."""
        session = self.sessions.pop(id_, None)
        if session is not None:
            session.let_go()
            self._trim()

    def read(self, session: Session, at: int, transaction: IncomingTransaction) -> None:
        """Output from a position on, as soon as there is some. Raises ConsoleError."""
        if not session.position <= at <= self.output.end:
            raise ConsoleError(Fault.BAD_REQUEST, f"output from byte {at} on: this session has had {session.position}, "
                                                  f"and there are {self.output.end}")
        session.drop_read()
        session.position, session.read = at, transaction
        self.serve()

    def write(self, session: Session, at: int, data: bytes, transaction: IncomingTransaction) -> None:
        """Input for the program, of which it has what is before `taken`. Raises ConsoleError."""
        session.drop_write()
        if not at <= session.taken <= at + len(data):
            raise ConsoleError(Fault.BAD_REQUEST, f"input from byte {at} on, the next one is {session.taken}")
        session.write, session.left = transaction, data[session.taken - at:]
        if self._master < 0:
            session.left = b""  # its program has ended, as the next READ says
        self.give()

    # -- within

    def _set(self, size: Size) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))

    @property
    def _slowest(self) -> int:
        """Position of the session that has had least."""
        return min((session.position for session in self.sessions.values() if not session.lapsed),
                   default=self.output.end)

    def _trim(self) -> None:
        self.output.trim(min(self._slowest, self.output.end - self._scrollback))


def _become(command: Sequence[str], environment: Mapping[str, str], terminal: int) -> None:
    """In the child: become the program. Never returns."""
    try:
        os.login_tty(terminal)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for number in (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(command[0], list(command), dict(environment))
    except OSError as error:
        os.write(2, f"{command[0]} cannot be run: {error.strerror}\n".encode())
    finally:
        os._exit(NOT_RUN)
