"""Frames over a Unix socket, as `idc.transport.tcp` frames them: for host processes and a server of many of them.

Who may connect is decided by the permissions of the path. Depends on idc.transport.tcp.
"""

from __future__ import annotations

import socket
import time

from idc.transport.tcp import REDIAL, StreamPort


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
