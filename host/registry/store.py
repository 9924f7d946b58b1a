"""The tree on disk: one file, which begins with all of a tree and goes on with what has changed since.

    file:    magic, then records
    record:  u32 bytes of the body, u32 CRC-32 of the body, body; little-endian
    body:    u8 kind. 1 NODES: u32 bytes of the domains or 0, the domains, effects; 2 WHOLE: the tree that the file
             began with is complete
    domains: u8 0, then for each u8 length, name, 16 bytes uuid: all there are
    effect:  u8 1 node or 0 removal, u8 bytes of the payer, u8 of the session, u16 of the path, of the value, of the
             permissions; then those

A batch is one record, written and synced before anything of it is told. When the file has grown, it is made anew beside
the old one, synced, and renamed over it. So after a crash the file holds a whole tree, and perhaps part of a batch that
nobody was told of: that part is cut off. A record that is damaged in any other place means that the disk lost
something: the registry does not start then. Depends on host.registry.tree.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import struct
import threading
import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from host.errors import HostError
from host.registry import tree
from host.registry.tree import Effect, Node, State
from idc.errors import MisuseError
from idc.registry import frames
from idc.registry.frames import FrameError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from host.registry.desk import Batch

MAGIC: Final = b"IDCREG1\n"
FILE: Final = "tree"
#: Bytes that the file may grow by before it is made anew.
GROWTH: Final = 1 << 22
#: Seconds between two lines about a batch that could not be written.
LOG_EVERY: Final = 1.0
_BESIDE: Final = ".new"
#: Effects in one record of a whole tree.
_CHUNK: Final = 256
_RECORD: Final = struct.Struct("<II")
_EFFECT: Final = struct.Struct("<BBBHHH")
_HEAD: Final = struct.Struct("<BI")
_UUID_BYTES: Final = 16
_NODES, _WHOLE = 1, 2

log = logging.getLogger("host.registry")


class StoreError(HostError):
    """The registry's directory cannot be used; the text says why, and what to do."""


class Store:
    """The file, and its tree when it was opened.

    Args:
        directory: of the registry alone; made if it is not there.
        growth: bytes that the file may grow by before it is made anew.

    Attributes:
        state: as it was found.
        cut: bytes of an unfinished batch that were cut off.
        written: bytes of the file.

    Raises:
        StoreError: the directory cannot be used, another registry uses it, or what it holds is damaged.
    """

    def __init__(self, directory: Path, growth: int = GROWTH) -> None:
        self.cut = 0
        self.written = 0
        self._path = directory / FILE
        self._growth = growth
        self._base = 0
        self._fd = -1
        self._doubtful = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"the registry's directory {directory}: {error.strerror}") from error
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.state = self._open()
        except BlockingIOError:
            os.close(self._directory)
            raise StoreError(f"another registry uses {directory}") from None
        except OSError as error:
            os.close(self._directory)
            raise StoreError(f"the registry's file {self._path}: {error.strerror}") from error
        except BaseException:
            os.close(self._directory)
            raise

    def close(self) -> None:
        """Let another one have it."""
        for fd in (self._fd, self._directory):
            if fd >= 0:
                os.close(fd)
        self._fd = self._directory = -1

    def write(self, batch: Batch) -> None:
        """Return once all of a batch is on disk. Raises OSError if none of it is."""
        if self._doubtful or self.written - self._base > max(self._growth, self._base):
            self._renew(batch.state)
            return
        record = _record(_pack(itertools.chain.from_iterable(batch.effects), batch.domains))
        try:
            _write_all(self._fd, record)
            os.fdatasync(self._fd)
        except OSError:
            self._doubtful = True  # what is in the file now nobody knows: the next batch makes it anew
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.written)
            raise
        self.written += len(record)

    def _open(self) -> State:
        self._path.with_suffix(_BESIDE).unlink(missing_ok=True)  # of one that was killed as it made the file anew
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            state = tree.empty()
            self._renew(state)
            return state
        state, end = _load(data, self._path)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self.cut = len(data) - end
        if self.cut:
            log.warning("%d bytes of an unfinished batch at byte %d of %s are cut off", self.cut, end, self._path)
            os.ftruncate(self._fd, end)
            os.fdatasync(self._fd)
        self.written = end
        return state

    def _renew(self, state: State) -> None:
        """Write a whole tree beside the file, and put it in its place. Raises OSError; the file is as it was then."""
        beside = self._path.with_suffix(_BESIDE)
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            size = 0
            for part in _whole(state):
                _write_all(fd, part)
                size += len(part)
            os.fsync(fd)
            os.rename(beside, self._path)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
        # From here on this is the file, whether or not the directory's entry is on disk yet.
        self._fd, old = fd, self._fd
        if old >= 0:
            os.close(old)
        self.written = self._base = size
        self._doubtful = True
        os.fsync(self._directory)
        self._doubtful = False


class Writer:
    """A thread that writes one batch after the other, so that nobody else waits for the disk.

    Args:
        store: closed with this object.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake = threading.Semaphore(0)
        self._batch: Batch | None = None
        self._done: tuple[Batch, str] | None = None
        self._log_after = 0.0
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Readable once a batch has been dealt with."""
        return self._event

    def start(self, batch: Batch) -> None:
        """Begin to write; the last one has been taken."""
        self._batch = batch
        self._wake.release()

    def take(self) -> tuple[Batch, str] | None:
        """(batch, empty or why it could not be written), once it is over."""
        done, self._done = self._done, None
        if done is not None:
            os.eventfd_read(self._event)
        return done

    def close(self) -> None:
        """Finish what is being written, and end."""
        self._wake.release()
        self._thread.join()
        self._store.close()
        os.close(self._event)

    def _run(self) -> None:
        while True:
            self._wake.acquire()
            batch, self._batch = self._batch, None
            if batch is None:
                return
            why = ""
            try:
                self._store.write(batch)
            except OSError as error:
                why = error.strerror or str(error)
                if time.monotonic() >= self._log_after:  # a full disk is not to be filled with this
                    self._log_after = time.monotonic() + LOG_EVERY
                    log.warning("a batch could not be written: %s", why)
            except Exception as error:  # a mistake of ours: without this thread nothing would be answered any more
                why = f"{type(error).__name__}: {error}"
                log.exception("a batch could not be written")
            # The event first: whoever sees that it is done must find the event to take.
            os.eventfd_write(self._event, 1)
            self._done = batch, why


def _write_all(fd: int, data: bytes) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(data):
            done += os.write(fd, view[done:])


def _record(body: bytes) -> bytes:
    return _RECORD.pack(len(body), zlib.crc32(body)) + body


def _whole(state: State) -> Iterator[bytes]:
    yield MAGIC
    nodes = tree.walk(state.root, "/")
    while chunk := [Effect(path, node) for path, node in itertools.islice(nodes, _CHUNK)]:
        yield _record(_pack(chunk))
    yield _record(_pack((), state.domains))
    yield _record(bytes([_WHOLE]))


def _pack(effects: Iterable[Effect], domains: Mapping[str, bytes] | None = None) -> bytes:
    known = b"" if domains is None else _pack_domains(domains)
    out = bytearray(_HEAD.pack(_NODES, len(known)) + known)
    for path, node in effects:
        if node is None:
            out += _EFFECT.pack(0, 0, 0, len(path), 0, 0) + path.encode("ascii")
            continue
        payer, permissions = node.payer.encode("ascii"), frames.pack_permissions(node.permissions)
        out += _EFFECT.pack(1, len(payer), len(node.session), len(path), len(node.value), len(permissions))
        out += payer + node.session + path.encode("ascii") + node.value + permissions
    return bytes(out)


def _pack_domains(domains: Mapping[str, bytes]) -> bytes:
    out = bytearray(1)
    for name, uuid in domains.items():
        out += bytes([len(name)]) + name.encode("ascii") + uuid
    return bytes(out)


def _load(data: bytes, path: Path) -> tuple[State, int]:
    """(the tree, where the last whole record ends). Raises StoreError."""
    whole = False
    state, end = State(Node(b"", tree.empty().root.permissions, frames.HOST, serial=1, names=1, deep=1)), len(MAGIC)
    if not data.startswith(MAGIC):
        raise StoreError(_damaged(path, 0))
    while body := _next(data, end):
        try:
            state, whole = _apply(state, body), whole or body[0] == _WHOLE
        except (FrameError, MisuseError, struct.error, KeyError, IndexError, UnicodeDecodeError) as error:
            raise StoreError(_damaged(path, end)) from error
        end += _RECORD.size + len(body)
    if not whole or _beyond(data, end):
        raise StoreError(_damaged(path, end))
    return replace(state, usage=tree.counted(state.root)), end


def _damaged(path: Path, at: int) -> str:
    return (f"the registry's file {path} is damaged at byte {at}: bring back a copy of it, or remove it, and all keys "
            "with it")


def _next(data: bytes, at: int) -> bytes:
    """The record there; empty if there is no whole one."""
    if len(data) - at < _RECORD.size:
        return b""
    length, code = _RECORD.unpack_from(data, at)
    body = data[at + _RECORD.size:at + _RECORD.size + length]
    return body if len(body) == length and zlib.crc32(body) == code else b""


def _beyond(data: bytes, at: int) -> bool:
    """Whether a whole record follows a broken one: then that was not the last, and had been told of."""
    if len(data) - at < _RECORD.size:
        return False
    after = at + _RECORD.size + int.from_bytes(data[at:at + 4], "little")
    return bool(_next(data, after))


def _apply(state: State, body: bytes) -> State:
    if body[0] == _WHOLE:
        return state
    kind, length = _HEAD.unpack_from(body)
    if kind != _NODES:
        raise FrameError(f"a record of kind {kind}")
    at = _HEAD.size + length
    if length:
        state = replace(state, domains=_parse_domains(body[_HEAD.size + 1:at]))
    root = state.root
    while at < len(body):
        there, *lengths = _EFFECT.unpack_from(body, at)
        at += _EFFECT.size
        payer, session, path, value, permissions = (
            body[at + sum(lengths[:i]):at + sum(lengths[:i + 1])] for i in range(len(lengths)))
        at += sum(lengths)
        root = _put(root, path.decode("ascii"), None if not there else Node(
            value, frames.parse_permissions(permissions), payer.decode("ascii"), session, 1, 1, 1))
    return replace(state, root=root)


def _parse_domains(data: bytes) -> dict[str, bytes]:
    domains, at = {}, 0
    while at < len(data):
        name = data[at + 1:at + 1 + data[at]].decode("ascii")
        at += 1 + len(name) + _UUID_BYTES
        domains[name] = data[at - _UUID_BYTES:at]
    return domains


def _put(root: Node, path: str, node: Node | None) -> Node:
    parts = frames.split(path)
    if node is not None and (old := tree.look(root, path)) is not None:
        node = replace(node, children=old.children)
    return tree.put(root, parts, node, 1)
