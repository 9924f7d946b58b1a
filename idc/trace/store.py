"""A trace in a file: appended in chunks, each with a checksum, so that what a crash cut off is recognised.

The file begins with MAGIC. A chunk is its kind (1 byte), 3 zero bytes, the length of its body and the CRC-32 of kind,
length and body (4 bytes each, little-endian), and the body: ORIGIN (JSON: whose events these are), EVENTS (whole
events) or END (why no more came, UTF-8). One file is one connection of one domain; none is ever appended to again.
Depends on idc.trace.events and idc.trace.hook.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import struct
import time
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from idc.errors import MisuseError, ProtocolError
from idc.trace import events
from idc.trace.events import FLOWS, Kind
from idc.trace.hook import expand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from idc.trace.events import TraceEvent
    from idc.trace.tracer import Tracer

MAGIC: Final = b"IDCTRC01"
SUFFIX: Final = ".idctrace"
#: Where a VM's traces lie unless told otherwise, and where `testbed trace` looks for them.
DIRECTORY: Final = "/var/lib/idc-trace"
CHUNK: Final = struct.Struct("<B3xII")
ORIGIN, EVENTS, END = 1, 2, 3
#: Most bytes of one chunk's body.
MOST_CHUNK: Final = 1 << 20
#: Most bytes that all files of one domain may take in a directory, unless told otherwise.
MOST_BYTES: Final = 1 << 30
#: What a file counts for at least, so that empty ones are bounded too.
LEAST_FILE: Final = 4096
#: Seconds between two times that data is forced to the disk.
SYNC_SECONDS: Final = 1.0
_DOMAIN = re.compile(r"[A-Za-z0-9_@:-][A-Za-z0-9_.@:-]{0,63}")


class FullError(Exception):
    """A domain's files have taken all that they may. The text says so."""


def check_domain(name: str) -> str:
    """A domain's name, if it can be one. Raises MisuseError."""
    if not _DOMAIN.fullmatch(name):
        raise MisuseError(f"domain {name!r}: 1 to 64 letters, digits or any of _.@:- are wanted, no dot first")
    return name


def _checksum(kind: int, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(CHUNK.pack(kind, len(body), 0)))


class StoreWriter:
    """Appends to a new file. A context manager.

    Args:
        directory: made if it is not there.
        domain: whose events these are, as who mediates says.
        recorder: the domain in which the file is written, on whose clock PINGs are answered.
        most_bytes: of all files of the domain in this directory.
        writer: whose word it is that several connections are of one writer, and its number; `resume` finds it by that.

    Attributes:
        length: bytes of events in the file.
        path: of the file.

    Raises:
        MisuseError: no domain's name.
        FullError: the domain's files have used up `most_bytes`.
        OSError: the file cannot be made.
    """

    def __init__(self, directory: Path, domain: str, recorder: str, *, most_bytes: int = MOST_BYTES,
                 writer: int | None = None) -> None:
        check_domain(domain)
        check_domain(recorder)
        directory.mkdir(parents=True, exist_ok=True)
        self._left = _left(directory, domain, most_bytes)
        self.length = 0
        self.path, self._fd = _create(directory, domain)
        self._synced = time.monotonic()
        self._closed = False
        try:
            self._write(MAGIC)
            origin: dict[str, str | int] = {"domain": domain, "recorder": recorder, "realtime_ns": time.time_ns()}
            if writer is not None:
                origin["writer"] = writer
            self._chunk(ORIGIN, json.dumps(origin).encode())
        except BaseException:
            os.close(self._fd)
            self.path.unlink()
            raise

    @classmethod
    def resume(cls, directory: Path, domain: str, recorder: str, writer: int, *,
               most_bytes: int = MOST_BYTES) -> Self | None:
        """Go on with the file of a writer that this process's predecessor was killed with; None if there is none.

        What it had not written whole is cut off. Raises as the constructor.
        """
        for path in reversed(of_domain(directory, domain)):
            with contextlib.suppress(ProtocolError, FileNotFoundError):
                found = read(path)
                if (found.recorder, found.writer) == (recorder, writer) and not found.ended:
                    break
        else:
            return None
        self = cls.__new__(cls)
        self._left = _left(directory, domain, most_bytes)
        self.path, self.length = path, sum(length for _, length in found._runs)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._synced = time.monotonic()
        self._closed = False
        os.ftruncate(self._fd, os.fstat(self._fd).st_size - found.unread)
        return self

    def append(self, run: bytes) -> None:
        """Write whole events. Raises FullError, and OSError where the file system cannot take them."""
        for at in range(0, len(run), MOST_CHUNK):
            # A chunk may end within an event: who reads joins them again.
            self._chunk(EVENTS, run[at:at + MOST_CHUNK])
        self.length += len(run)
        now = time.monotonic()
        if now >= self._synced + SYNC_SECONDS:
            self._synced = now
            os.fdatasync(self._fd)

    def leave(self) -> None:
        """Let go of the file, which another process goes on with. Idempotent."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)

    def close(self, reason: str = "closed") -> None:
        """Write why no more will come. Idempotent. Raises OSError."""
        if not self._closed:
            self._closed = True
            try:
                self._left = LEAST_FILE  # the last words are not subject to the limit
                self._chunk(END, reason.encode("utf-8", "replace")[:256])
                os.fdatasync(self._fd)
            finally:
                os.close(self._fd)

    def _chunk(self, kind: int, body: bytes) -> None:
        self._left -= CHUNK.size + len(body)
        if self._left < 0:
            raise FullError(f"{self.path} is full: its domain's traces have reached their limit")
        self._write(CHUNK.pack(kind, len(body), _checksum(kind, body)) + body)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view):]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # a full disk: the error that is under way says so
            self.close(f"{type(error).__name__}: {error}")


def _left(directory: Path, domain: str, most: int) -> int:
    """Bytes that a domain's files may still take. Raises FullError."""
    left = most - sum(max(path.stat().st_size, LEAST_FILE) for path in of_domain(directory, domain))
    if left < LEAST_FILE:
        raise FullError(f"the traces of domain {domain} in {directory} take {most} bytes, which is the limit")
    return left


def of_domain(directory: Path, domain: str) -> list[Path]:
    """The files of a domain in a directory, in the order of their numbers."""
    return sorted((path for path in directory.glob(f"*{SUFFIX}")
                   if path.name.removesuffix(SUFFIX).rpartition(".")[0] == domain), key=_number)


def _number(path: Path) -> int:
    text = path.name.removesuffix(SUFFIX).rpartition(".")[2]
    return int(text) if text.isdecimal() else 0


def _create(directory: Path, domain: str) -> tuple[Path, int]:
    number = max((_number(path) for path in of_domain(directory, domain)), default=0)
    while True:
        number += 1
        path = directory / f"{domain}.{number}{SUFFIX}"
        with contextlib.suppress(FileExistsError):
            return path, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


class FileSink:
    """A `Sink` straight into a file: for the domain whose file system it is. Lossless while the file system takes it.

    Args:
        store: closed with the sink.
    """

    def __init__(self, store: StoreWriter) -> None:
        self.reason = ""
        self._store = store
        self._buffer = memoryview(b"")
        self._run = bytearray()

    def bind(self, buffer: memoryview) -> None:
        """See there."""
        self._buffer = buffer

    def put(self, length: int) -> bool:
        """See there."""
        if self.reason:
            return False
        self._run += self._buffer[:length]
        return len(self._run) < 64 << 10 or self._flush()

    def due(self, tracer: Tracer, now: int) -> None:
        """See there: writes what has come together."""
        del tracer, now
        self._flush()

    def has_room(self, length: int) -> bool:
        """See there."""
        del length
        return not self.reason

    def await_room(self, length: int) -> bool:
        """See there."""
        del length
        return not self.reason

    def dropped(self) -> None:
        """See there. Nobody looks on."""

    def close(self, tracer: Tracer) -> None:
        """See there."""
        del tracer
        if self._flush():
            self._store.close()
        self.reason = self.reason or "closed"

    def _flush(self) -> bool:
        try:
            if self._run and not self.reason:
                self._store.append(bytes(self._run))
        except (OSError, FullError) as error:
            self.reason = str(error)
        self._run.clear()
        return not self.reason


@dataclass
class TraceFile:
    """What a file holds.

    Attributes:
        path: of it.
        domain, recorder: see `StoreWriter`.
        ended: why no more came; empty if the file does not say, because it is being written or its writer died.
        unread: bytes at the end that are no whole chunk, or whatever follows the first that is damaged.
        broken: what stands where an event should, if anything: the events before it count.
        writer: see `StoreWriter`; None if there is none.
    """

    path: Path
    domain: str
    recorder: str
    ended: str = ""
    unread: int = 0
    broken: str = ""
    writer: int | None = None
    _runs: list[tuple[int, int]] = field(default_factory=list)

    def events(self) -> Iterator[TraceEvent]:
        """What happened, in the order of each lane: the moments of endpoints, each as an event of its own."""
        flows: dict[int, tuple[int, int]] = {}
        for event in self.logged():
            if event.kind == Kind.CONNECT and len(event.data) == FLOWS.size:
                flows[event.lane] = FLOWS.unpack(event.data)
            if event.kind == Kind.MOMENTS:
                yield from expand(event, flows.get(event.lane, (0, 0)))
            else:
                yield event

    def logged(self) -> Iterator[TraceEvent]:
        """Events as they were logged, of whole chunks."""
        rest = b""
        with self.path.open("rb") as file:
            for at, length in self._runs:
                file.seek(at)
                rest += file.read(length)
                try:
                    end, _ = events.whole(rest)
                    yield from events.split(rest[:end])
                except ProtocolError as error:
                    self.broken = str(error)
                    return
                rest = rest[end:]
        if rest and not self.unread:
            self.unread = len(rest)


def read(path: Path) -> TraceFile:
    """Look through a file.

    Raises:
        ProtocolError: it is no trace, or its first chunk does not say whose.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            raise ProtocolError(f"{path} is no trace: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
            return _scan(path, data)


def _scan(path: Path, data: mmap.mmap) -> TraceFile:
    found, at, size = None, len(MAGIC), len(data)
    while size - at >= CHUNK.size:
        kind, length, checksum = CHUNK.unpack_from(data, at)
        body = at + CHUNK.size
        if length > min(MOST_CHUNK, size - body):
            break
        content = data[body:body + length]
        if data[at + 1:at + 4] != b"\0\0\0" or _checksum(kind, content) != checksum:
            break
        if found is None:
            found = _origin(path, kind, content)
        elif kind == EVENTS:
            found._runs.append((body, length))
        elif kind == END:
            found.ended = events.printable(content)
        at = body + length
    if found is None:
        raise ProtocolError(f"{path} is no trace that can be used: its first chunk, which says whose it is, is damaged")
    found.unread = size - at
    return found


def _origin(path: Path, kind: int, content: bytes) -> TraceFile:
    try:
        origin = json.loads(content) if kind == ORIGIN else {}
        writer = origin.get("writer")
        return TraceFile(path, check_domain(str(origin["domain"])), check_domain(str(origin["recorder"])),
                         writer=None if writer is None else int(writer))
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"{path} is no trace that can be used: its first chunk does not say whose it is") from error
