"""Frames over a Unix socket, as `idc.transport.tcp` frames them: for host processes and a server of many of them.

Who may connect is decided by the permissions of the path. Depends on idc.transport.tcp.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

from idc.errors import MisuseError
from idc.transport.tcp import REDIAL, StreamPort

if TYPE_CHECKING:
    from pathlib import Path


class UnixPort(StreamPort):
    """The end that connects, again and again until somebody listens at the path."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._not_before = 0.0

    def _seek(self) -> None:
        if self._carrier is not None or time.monotonic() < self._not_before:
            return
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(self._path)
        except OSError:  # nobody there, or its queue is full
            connection.close()
            self._not_before = time.monotonic() + REDIAL
        else:
            self._next = connection

    def wait(self, timeout: float) -> None:
        """See `idc.transport.base.Port`."""
        pause = self._not_before - time.monotonic()
        if self._carrier is None and self._next is None and pause > 0:
            time.sleep(min(pause, timeout))
        else:
            super().wait(timeout)


class AcceptedPort(StreamPort):
    """One connection that a listener has accepted: the peer is there until that ends, and does not come again."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        connection.setblocking(False)
        self._next = connection

    def _seek(self) -> None:
        """There is no other."""


def port(path: str) -> UnixPort:
    """The connecting end for a path."""
    return UnixPort(path)


def listen(path: Path, backlog: int) -> socket.socket:
    """A listening socket there, its owner's alone (0600); one that a dead process left gives way.

    Raises OSError, MisuseError.
    """
    if len(os.fsencode(path)) > 107:
        raise MisuseError(f"{path}: the path of a socket has 107 bytes at most")
    if not path.parent.is_dir():  # as a rule it is, and to make it in vain takes an emulated guest a millisecond
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        path.unlink(missing_ok=True)
        old = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener
