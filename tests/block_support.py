"""For tests of block devices: a kernel's nbd in this process, and a disk whose every byte is known."""

from __future__ import annotations

import array
import errno
import json
import random
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from region_support import DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

READ, WRITE, DISC, FLUSH, TRIM, ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698


def request(kind: int, handle: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> bytes:
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, handle, offset, length) + data


@dataclass
class Asked:
    """A request that the kernel has not been answered."""

    kind: int
    wire: bytes
    length: int
    done: Callable[[int, bytes], None]


@dataclass
class Connection:
    """One socket of the device."""

    socket: socket.socket | None
    out: bytearray = field(default_factory=bytearray)
    inbox: bytearray = field(default_factory=bytearray)
    asked: dict[int, Asked] = field(default_factory=dict)

    @property
    def dead(self) -> bool:
        return self.socket is None


class FakeNbd:
    """What the kernel does: sends requests, takes replies; after new sockets it sends again what was not answered.

    Attributes:
        log: commands that came.
        disk: of the last connect or reconfigure.
    """

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self.path = path
        self.connections: list[Connection] = []
        self.log: list[str] = []
        self.disk: dict[str, Any] = {}
        self._handle = 0
        self._next = 0

    def pump(self, timeout: float = 0.0) -> None:
        """Do what can be done, after waiting for something."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        for connection in self.connections:
            if connection.socket is not None:
                poller.register(connection.socket, select.POLLIN | (select.POLLOUT if connection.out else 0))
        poller.poll(timeout * 1000)
        if select.select([self._listener], [], [], 0)[0]:
            self._command()
        for connection in self.connections:
            self._move(connection)

    def ask(self, kind: int, offset: int, length: int, data: bytes, flags: int,
            done: Callable[[int, bytes], None]) -> None:
        """Submit; `done(error, data)`."""
        self._handle += 1
        connection = self.connections[self._next % len(self.connections)]
        self._next += 1
        wire = request(kind, self._handle, offset, length, data, flags)
        connection.asked[self._handle] = Asked(kind, wire, length, done)
        if not connection.dead:
            connection.out += wire

    @property
    def outstanding(self) -> int:
        return sum(len(connection.asked) for connection in self.connections)

    def until(self, what: Callable[[], bool], limit: float = DEADLINE) -> None:
        deadline = time.monotonic() + limit
        while not what():
            assert time.monotonic() < deadline, (self.log, self.outstanding)
            self.pump(0.05)

    def one(self, kind: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0,
            limit: float = DEADLINE) -> tuple[int, bytes]:
        """A request and its answer."""
        answers: list[tuple[int, bytes]] = []
        self.ask(kind, offset, length, data, flags, lambda error, data: answers.append((error, data)))
        self.until(lambda: bool(answers), limit)
        return answers[0]

    def close(self) -> None:
        self._listener.close()
        for connection in self.connections:
            if connection.socket is not None:
                connection.socket.close()

    # -- within

    def _command(self) -> None:
        link, _ = self._listener.accept()
        with link:
            message, fds, _, _ = socket.recv_fds(link, 4096, 8)
            if not message:
                return
            what = json.loads(message)
            self.log.append(what["command"])
            answer = {"error": 0, "identifier": self.disk.get("identifier")}
            given = deque(socket.socket(fileno=fd) for fd in array.array("i", fds))
            for end in given:
                end.setblocking(False)
            if what["command"] == "connect":
                if self.disk:
                    answer["error"] = errno.EBUSY
                else:
                    self.disk = what
                    self.connections = [Connection(given.popleft()) for _ in range(len(given))]
            elif what["command"] == "reconfigure":
                for connection in self.connections:
                    self._move(connection)
                    if given and connection.dead:
                        connection.socket = given.popleft()
                        connection.out = bytearray(b"".join(asked.wire for asked in connection.asked.values()))
                answer["error"] = errno.ENOSPC if given else 0
                while given:
                    given.popleft().close()
            elif what["command"] == "disconnect":
                self.disk = {}
            link.send(json.dumps(answer).encode())

    def _move(self, connection: Connection) -> None:
        try:
            while connection.socket is not None and connection.out:
                del connection.out[:connection.socket.send(connection.out[:1 << 18])]
        except BlockingIOError:
            pass
        except OSError:
            self._end(connection)
        try:
            while connection.socket is not None:
                got = connection.socket.recv(1 << 18)
                if not got:
                    self._end(connection)
                    break
                connection.inbox += got
        except BlockingIOError:
            pass
        except OSError:
            self._end(connection)
        while self._reply(connection):
            pass

    @staticmethod
    def _end(connection: Connection) -> None:
        assert connection.socket is not None
        connection.socket.close()
        connection.socket = None
        connection.out.clear()

    @staticmethod
    def _reply(connection: Connection) -> bool:
        inbox = connection.inbox
        if len(inbox) < REPLY.size:
            if connection.dead:
                inbox.clear()
            return False
        magic, error, handle = REPLY.unpack_from(inbox)
        assert magic == REPLY_MAGIC
        asked = connection.asked[handle]  # a KeyError is an answer that nobody asked for, or a second one
        length = asked.length if asked.kind == READ and not error else 0
        if len(inbox) < REPLY.size + length:
            if connection.dead:
                inbox.clear()
            return False
        data = bytes(inbox[REPLY.size:REPLY.size + length])
        del inbox[:REPLY.size + length]
        del connection.asked[handle]
        asked.done(error, data)
        return True


class KnownDisk:
    """Random requests, none of which overlaps another one under way, and what each byte must be.

    Attributes:
        errors: requests that failed.
    """

    def __init__(self, nbd: FakeNbd, content: bytes, seed: int, longest: int = 70_000) -> None:
        self._nbd = nbd
        self.content = bytearray(content)
        self._random = random.Random(seed)
        self._longest = longest
        self._busy: list[tuple[int, int]] = []
        self.done = 0
        self.errors: list[int] = []

    def submit(self, depth: int) -> None:
        """Keep so many under way."""
        while self._nbd.outstanding < depth:
            self._one()

    def _one(self) -> None:
        chance, size = self._random, len(self.content)
        kind = chance.choice((READ, READ, WRITE, WRITE, WRITE, TRIM, ZEROES, FLUSH))
        if kind == FLUSH:
            self._nbd.ask(FLUSH, 0, 0, b"", 0, lambda error, _: self._over(None, error))
            return
        offset = chance.randrange(size)
        length = chance.randrange(1, min(self._longest, size - offset) + 1)
        if any(offset < end and begin < offset + length for begin, end in self._busy):
            return
        span = (offset, offset + length)
        self._busy.append(span)
        if kind == READ:
            def checked(error: int, data: bytes) -> None:
                assert error or data == self.content[span[0]:span[1]], span
                self._over(span, error)

            self._nbd.ask(READ, offset, length, b"", 0, checked)
            return
        data = chance.randbytes(length) if kind == WRITE else bytes(length)

        def written(error: int, _: bytes) -> None:
            if not error:
                self.content[span[0]:span[1]] = data
            self._over(span, error)

        flags = FUA if chance.random() < 0.1 else 0
        self._nbd.ask(kind, offset, length, data if kind == WRITE else b"", flags, written)

    def _over(self, span: tuple[int, int] | None, error: int) -> None:
        if span is not None:
            self._busy.remove(span)
        self.done += 1
        if error:
            self.errors.append(error)

    def run(self, requests: int, depth: int = 16, limit: float = 60.0) -> None:
        """So many more requests."""
        target, deadline = self.done + requests, time.monotonic() + limit
        while self.done < target:
            assert time.monotonic() < deadline, (self.done, target, self._nbd.log, self._nbd.outstanding)
            self.submit(depth)
            self._nbd.pump(0.05)

    def finish(self) -> None:
        """Nothing is under way any more."""
        self._nbd.until(lambda: self._nbd.outstanding == 0)

    def verify(self) -> None:
        """Read all of it."""
        self.finish()
        for offset in range(0, len(self.content), 1 << 18):
            length = min(1 << 18, len(self.content) - offset)
            error, data = self._nbd.one(READ, offset, length)
            assert not error
            assert data == self.content[offset:offset + length]
