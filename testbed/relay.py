"""Joins a command in a guest to file descriptors of the host: what it reads and writes goes through them.

May depend on `testbed.agent` and `testbed.errors`. The descriptors may be anybody's (a terminal, a pipe of another
process), so their modes are left alone: they block, and threads of their own wait for them.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import TYPE_CHECKING

from testbed.errors import TestbedError

if TYPE_CHECKING:
    from testbed.agent import AgentClient
    from testbed.calls import Process

_PIECE = 64 * 1024


class Relay:
    """Moves bytes until the command ends. Owns the descriptors it is given, and closes them.

    Args:
        agent: which runs `process`, spawned with `stdin=True` if `stdin` is given.
        process: the command.
        stdin: read from, None for none.
        stdout: gets its standard output.
        stderr: gets its standard error.
    """

    def __init__(self, agent: AgentClient, process: Process, stdin: int | None, stdout: int, stderr: int) -> None:
        self._agent = agent
        self._process = process
        self._outputs = [stdout, stderr]
        self._exit_code: int | None = None
        self._failure: BaseException | None = None
        self._over = threading.Event()
        # Readable once it is over: for the stdin thread here, and for whoever polls.
        self._end_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads = [threading.Thread(target=self._out, name="relay out", daemon=True)]
        if stdin is not None:
            self._threads.append(threading.Thread(target=self._in, args=[stdin], name="relay in", daemon=True))
        for thread in self._threads:
            thread.start()

    def fileno(self) -> int:
        """Readable when the command has ended and all its output was written, or the VM failed."""
        return self._end_fd

    def result(self) -> int:
        """Wait for the end; the exit code as in subprocess. Raises what the VM says if it ended."""
        self._over.wait()
        if self._failure is not None:
            raise self._failure
        assert self._exit_code is not None
        return self._exit_code

    def kill(self, number: int) -> None:
        """Signal the command's process group."""
        self._process.kill(number)

    def cancel(self) -> None:
        """Nobody wants it any more: kill the command's process group, and wait for nothing."""
        self._agent.cancel(self._process)
        self._finish()

    def close(self) -> None:
        """Let go of what is left, after the end."""
        self._finish()
        for thread in self._threads:
            thread.join(1.0)  # one that still waits for its reader keeps its descriptors until that ends
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._end_fd)

    def _finish(self) -> None:
        if not self._over.is_set():
            self._over.set()
            os.eventfd_write(self._end_fd, 1)

    def _out(self) -> None:
        try:
            while not self._over.is_set():
                pieces = self._process.read()
                if not any(pieces):
                    break
                for fd, data in zip(self._outputs, pieces, strict=True):
                    self._write(fd, data)
            if not self._over.is_set():
                self._exit_code = self._process.wait().exit_code
        except (TestbedError, OSError) as error:
            self._failure = error
            if isinstance(error, OSError):  # on the host's side, such as a full disk: the command goes too
                self._agent.cancel(self._process)
        finally:
            for fd in self._outputs:
                os.close(fd)
            self._finish()

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except BrokenPipeError:
            # Its reader has gone. A command here would get this signal too; one that ignores it may go on.
            self._process.kill(signal.SIGPIPE)

    def _in(self, stdin: int) -> None:
        poller = select.poll()
        poller.register(stdin, select.POLLIN)
        poller.register(self._end_fd, select.POLLIN)
        try:
            # Polled, not just read: a read that is under way when the command ends would eat what is typed next.
            while not self._over.is_set():
                ready = dict(poller.poll())
                if self._end_fd in ready:
                    return
                data = self._read(stdin)
                if not data:
                    self._process.close_stdin()
                    return
                self._process.write(data)
        except TestbedError:
            return  # the other thread tells it
        finally:
            os.close(stdin)

    @staticmethod
    def _read(stdin: int) -> bytes:
        with contextlib.suppress(OSError):  # a terminal that is gone (EIO) has no more to say
            return os.read(stdin, _PIECE)
        return b""
