"""The peers that a user would pick instead: a plain socket, echoing and streaming, over TCP, vsock or a Unix socket.

Straightforward blocking Python, as fast as that gets: no delayed sends (TCP_NODELAY), buffers made once and received
into. Depends on the standard library.
"""

from __future__ import annotations

import socket
import struct
import time
from array import array

_LENGTH = struct.Struct("<I")
#: Seconds that one call may wait for the other end.
STALL = 30.0


class Connection:
    """One connected stream socket between the two ends of a measurement.

    Args:
        family: "tcp", "vsock" or "unix".
        address: where: "HOST:PORT", "CID:PORT" or a path.
    """

    def __init__(self, family: str, address: str) -> None:
        self._family = family
        self._address = address
        self._listener: socket.socket | None = None
        self.sock: socket.socket | None = None

    def listen(self) -> None:
        """Be there to be connected to."""
        self._listener = self._make()
        if self._family == "tcp":
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(self._place())
        self._listener.listen(1)

    def accept(self) -> None:
        """Take the other end's connection."""
        assert self._listener is not None
        self._listener.settimeout(STALL)
        self._use(self._listener.accept()[0])
        self._listener.close()

    def connect(self) -> None:
        """Connect to the end that listens."""
        sock = self._make()
        sock.settimeout(STALL)
        sock.connect(self._place())
        self._use(sock)

    def close(self) -> None:
        """Close what is open."""
        for sock in (self._listener, self.sock):
            if sock is not None:
                sock.close()

    def _make(self) -> socket.socket:
        families = {"tcp": socket.AF_INET, "vsock": socket.AF_VSOCK, "unix": socket.AF_UNIX}
        return socket.socket(families[self._family], socket.SOCK_STREAM)

    def _place(self) -> str | tuple[str | int, int]:
        if self._family == "unix":
            return self._address
        host, _, port = self._address.rpartition(":")
        return (host if self._family == "tcp" else int(host), int(port))

    def _use(self, sock: socket.socket) -> None:
        if self._family == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Blocking without a limit of Python's own, which would be a poll(2) before each call; the kernel's own is free.
        sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, array("q", [int(STALL), 0]).tobytes())
        self.sock = sock

    # -- loops

    def ping(self, size: int, count: int, per: int, *, polls: bool = False) -> array[int]:
        """`count` samples in ns, each the mean of `per` round trips of `size` bytes; `polls`: never sleeping."""
        assert self.sock is not None
        fill = _poll if polls else _fill
        message, sock, now, into = bytes(size), self.sock, time.monotonic_ns, memoryview(bytearray(size))
        samples = array("Q", bytes(8 * count))
        before = now()
        for index in range(count):
            for _ in range(per):
                sock.sendall(message)
                fill(sock, into, size)
            after = now()
            samples[index] = (after - before) // per
            before = after
        return samples

    def echo(self, size: int, rounds: int, *, polls: bool = False) -> None:
        """Send back whatever comes, `rounds` times."""
        assert self.sock is not None
        sock, into, fill = self.sock, memoryview(bytearray(size)), _poll if polls else _fill
        for _ in range(rounds):
            fill(sock, into, size)
            sock.sendall(into)

    def framed_ping(self, size: int, count: int, per: int) -> array[int]:
        """`ping` of messages that carry their length, as the other end does not know it."""
        assert self.sock is not None
        message, sock, now, receive = bytes(size), self.sock, time.monotonic_ns, self._receive_framed
        samples = array("Q", bytes(8 * count))
        before = now()
        for index in range(count):
            for _ in range(per):
                sock.sendall(_LENGTH.pack(size) + message)
                receive()
            after = now()
            samples[index] = (after - before) // per
            before = after
        return samples

    def framed_echo(self, rounds: int) -> None:
        """Send back whatever comes, `rounds` times."""
        assert self.sock is not None
        sock, receive = self.sock, self._receive_framed
        for _ in range(rounds):
            message = receive()
            sock.sendall(_LENGTH.pack(len(message)) + message)

    def _receive_framed(self) -> bytearray:
        assert self.sock is not None
        head = bytearray(_LENGTH.size)
        _fill(self.sock, memoryview(head), len(head))
        body = bytearray(_LENGTH.unpack(head)[0])
        if body:
            _fill(self.sock, memoryview(body), len(body))
        return body

    def stream_out(self, total: int, chunk: int) -> int:
        """Send `total` bytes, `chunk` at a time, and wait for one byte back; the nanoseconds of that."""
        assert self.sock is not None
        data, send = bytes(chunk), self.sock.sendall
        began = time.monotonic_ns()
        for _ in range(total // chunk):
            send(data)
        self.take_word()
        return time.monotonic_ns() - began

    def stream_in(self, total: int, chunk: int) -> None:
        """Receive `total` bytes into one buffer, whatever comes up to `chunk` at a time, then send one byte back."""
        assert self.sock is not None
        into, receive, left = memoryview(bytearray(chunk)), self.sock.recv_into, total
        while left:
            got = receive(into, min(chunk, left))
            if got == 0:
                raise ConnectionError("the other end closed its socket")
            left -= got
        self.give_word()

    def take_word(self) -> None:
        """Wait for one byte: the other end has everything."""
        assert self.sock is not None
        _fill(self.sock, memoryview(bytearray(1)), 1)

    def give_word(self) -> None:
        """Say that everything is here."""
        assert self.sock is not None
        self.sock.sendall(b"!")


def _poll(sock: socket.socket, into: memoryview, size: int) -> None:
    got, deadline = 0, time.monotonic() + STALL
    while got < size:
        try:
            part = sock.recv_into(into[got:] if got else into, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            continue
        if part == 0:
            raise ConnectionError("the other end closed its socket")
        got += part


def _fill(sock: socket.socket, into: memoryview, size: int) -> None:
    got = sock.recv_into(into)
    while got < size:
        if got == 0:
            raise ConnectionError("the other end closed its socket")
        got += sock.recv_into(into[got:])
