"""The two transports of `idc.transfer`: channels in shared memory, and a TCP socket.

Shared memory: notes go through a message channel, bulk through a byte channel whose ring is filled by read(2) and
emptied by write(2) in place, so a byte is copied once at each side. TCP: one socket; bulk by sendfile(2).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from idc.errors import IdcError, PeerGoneError, TimedOutError
from idc.transfer import TransferError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.channel import ByteChannel, MessageChannel
    from idc.transfer import Note

#: Longest note, bytes of JSON.
NOTE_LIMIT = 4000
#: Most bytes of JSON for one character: two escapes, \\ud83d\\ude00.
LONGEST_ESCAPE = 12
#: Bytes per system call of the bulk path. Long enough to hide Python, short enough that both sides work at once.
STEP = 256 << 10


def encode_note(note: Note, limit: int = NOTE_LIMIT) -> bytes:
    """A note as JSON of at most `limit` bytes; reasons too long for that are cut, not refused."""
    text = json.dumps(note).encode()
    if len(text) > limit and "reason" in note:
        room = limit - len(json.dumps(note | {"reason": ""}))
        text = json.dumps(note | {"reason": str(note["reason"])[:room // LONGEST_ESCAPE]}).encode()
    if len(text) > limit:
        raise IdcError(f"a note of {len(text)} bytes is longer than {limit}")
    return text


def decode_note(data: bytes) -> Note:
    """Parse what a peer sent; anything but a JSON object is its error."""
    try:
        note = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IdcError(f"the peer sent a note that is not JSON: {data[:80]!r}") from error
    if not isinstance(note, dict):
        raise IdcError(f"the peer sent a note that is no object: {data[:80]!r}")
    return note


class ChannelConduit:
    """Notes and bulk over two channels of one region. Not closed here: the channels are the caller's."""

    def __init__(self, notes: MessageChannel, bulk: ByteChannel) -> None:
        self._notes = notes
        self._bulk = bulk

    def send_note(self, note: Note, timeout: float) -> None:
        """See `idc.transfer.Conduit`."""
        sender = self._notes.sender
        sender.send(encode_note(note, min(NOTE_LIMIT, sender.max_message)), timeout=timeout)

    def receive_note(self, timeout: float) -> Note:
        """See `idc.transfer.Conduit`."""
        return decode_note(self._notes.receiver.recv(timeout=timeout))

    def send_bulk(self, fd: int, size: int, progress: Callable[[int], None], timeout: float) -> None:
        """See `idc.transfer.Conduit`."""
        sender, sent = self._bulk.sender, 0
        while sent < size:
            # the views are released at once: one that lives on in a traceback would keep the region mapped
            with (sender.reserve(min(STEP, size - sent), timeout=timeout) as span,
                  span.memory[:min(STEP, size - sent)] as view):
                count = os.preadv(fd, [view], sent)
                if count == 0:
                    raise TransferError(f"the file shrank to {sent} of {size} bytes while it was sent")
                span.commit(count)
            sent += count
            progress(sent)

    def receive_bulk(self, fd: int, size: int, progress: Callable[[int], None], timeout: float) -> None:
        """See `idc.transfer.Conduit`."""
        receiver, got = self._bulk.receiver, 0
        while got < size:
            with receiver.peek(timeout=timeout) as span, span.memory[:min(STEP, size - got)] as view:
                count = os.write(fd, view)
                span.consume(count)
            got += count
            progress(got)

    def refuse_bulk(self) -> None:
        """See `idc.transfer.Conduit`."""
        self._bulk.close()


class SocketConduit:
    """Notes and bulk over one connected TCP socket, whose time-outs this object sets."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # a peer whose machine died sends no FIN: let the kernel find out
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)

    def send_note(self, note: Note, timeout: float) -> None:
        """See `idc.transfer.Conduit`."""
        data = encode_note(note)
        self._socket.settimeout(timeout)
        with _as_idc_errors():
            self._socket.sendall(struct.pack("<I", len(data)) + data)

    def receive_note(self, timeout: float) -> Note:
        """See `idc.transfer.Conduit`."""
        deadline = time.monotonic() + timeout
        (length,) = struct.unpack("<I", self._exactly(4, deadline))
        if length > NOTE_LIMIT:
            raise IdcError(f"the peer announces a note of {length} bytes, the limit is {NOTE_LIMIT}")
        return decode_note(self._exactly(length, deadline))

    def _exactly(self, count: int, deadline: float) -> bytes:
        data = b""
        with _as_idc_errors():
            while len(data) < count:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
                more = self._socket.recv(count - len(data))
                if not more:
                    raise PeerGoneError("the peer closed the connection")
                data += more
        return data

    def send_bulk(self, fd: int, size: int, progress: Callable[[int], None], timeout: float) -> None:
        """See `idc.transfer.Conduit`."""
        self._socket.setblocking(False)
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT | select.POLLIN)
        sent, deadline = 0, time.monotonic() + timeout
        with _as_idc_errors():
            while sent < size:
                events = poller.poll(max(0.0, deadline - time.monotonic()) * 1000)
                if not events:
                    raise TimedOutError(f"the receiver took nothing for {timeout:g} s, at {sent} of {size} bytes")
                if events[0][1] & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    raise PeerGoneError(f"the receiver stopped the transfer at {sent} of {size} bytes")
                with contextlib.suppress(BlockingIOError):
                    count = os.sendfile(self._socket.fileno(), fd, sent, min(size - sent, 4 * STEP))
                    if count == 0:
                        raise TransferError(f"the file shrank to {sent} of {size} bytes while it was sent")
                    sent += count
                    deadline = time.monotonic() + timeout
                    progress(sent)

    def receive_bulk(self, fd: int, size: int, progress: Callable[[int], None], timeout: float) -> None:
        """See `idc.transfer.Conduit`."""
        self._socket.settimeout(timeout)
        buffer, got = memoryview(bytearray(STEP)), 0
        while got < size:
            with _as_idc_errors():
                count = self._socket.recv_into(buffer[:min(STEP, size - got)])
            if count == 0:
                raise PeerGoneError(f"the sender closed the connection at {got} of {size} bytes")
            written = 0
            while written < count:
                written += os.write(fd, buffer[written:count])
            got += count
            progress(got)

    def refuse_bulk(self) -> None:
        """See `idc.transfer.Conduit`."""
        # the note that says why is already queued: shutting down our reading side makes the sender stop
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)


_NO_WAY = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}


class _as_idc_errors(contextlib.AbstractContextManager[None]):
    """Turn a socket's errors into the library's; the library's own and the file's (EIO) pass through."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, IdcError):
            return
        if isinstance(error, TimeoutError):
            raise TimedOutError("the peer sent or took nothing in time") from error
        if isinstance(error, OSError) and (isinstance(error, ConnectionError) or error.errno in _NO_WAY):
            raise PeerGoneError(f"the connection broke: {error.strerror}") from error
