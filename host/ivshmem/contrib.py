"""`ivshmem-server`: a drop-in for QEMU's contrib/ivshmem-server, with the same options and defaults.

May depend on the standard library, host.errors, host.wire and host.ivshmem. One socket; each connection gets
a fresh id, and the others are told when it comes and when it goes. Where it differs from QEMU's example:

- an id is never given out again: QEMU's device cannot take back what was freed when the earlier owner left.
  After 65536 connections the server refuses new ones and says so; restart it, with new devices;
- a client that does not read delays nobody and is cut off; one that writes is cut off as well;
- a socket left behind by a killed server does not keep the next from starting;
- one that finds the socket in use has not touched the memory: resizing it would kill the other's clients.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import socket
import sys
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from host import wire
from host.errors import HostError
from host.ivshmem.protocol import MAX_ID, greeting, left, vectors_of
from host.ivshmem.server import SEND_TIMEOUT, Connection, Loop, log
from host.wire import Fd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_VECTORS: Final = 64  # as in QEMU's ivshmem-server.h
MAX_SIZE: Final = 1 << 62  # the largest power of two that a file's size can be
_PAGE: Final = 4096
_SUFFIXES: Final = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


@dataclass(slots=True)
class _Peer:
    connection: Connection
    vectors: list[Fd]
    told: set[int] = field(default_factory=set)  # earlier peers that know of this one; later ones always do


class ContribServer:
    """The server behind one socket: ids from `first_id` upwards, `vectors` eventfds for each client."""

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        memory: Fd,
        vectors: int,
        *,
        first_id: int = 0,
        send_timeout: float = SEND_TIMEOUT,
        verbose: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._loop = loop
        self._memory = memory
        self._vectors = vectors
        self._next_id = first_id
        self._send_timeout = send_timeout
        self._verbose = verbose
        self._peers: dict[int, _Peer] = {}
        self._leaving: deque[tuple[int, _Peer]] = deque()
        # Who may connect is said by the socket's permissions, as with QEMU's server.
        loop.accept_on(listener, self._accepted, any_user=True)

    def _accepted(self, sock: socket.socket) -> None:
        if self._next_id > MAX_ID:
            log(f"refused a connection: all {MAX_ID + 1} ids are used up, restart the server")
            sock.close()
            return
        try:
            vectors = [Fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) for _ in range(self._vectors)]
        except OSError as error:
            log(f"refused a connection: cannot make its {self._vectors} eventfds: {error.strerror}")
            sock.close()
            return
        own = self._next_id
        self._next_id += 1
        connection = Connection(self._loop, sock, lambda why: self._left(own, why), self._send_timeout)
        peer = _Peer(connection, vectors)
        others = dict(self._peers)
        self._peers[own] = peer
        self._verbose(f"peer {own} connected")
        connection.send(
            greeting(own, self._memory, vectors, {number: other.vectors for number, other in others.items()})
        )
        for number, other in others.items():
            if not connection.open:
                break
            peer.told.add(number)
            other.connection.send(vectors_of(own, vectors))

    def _left(self, own: int, reason: str) -> None:
        self._verbose(f"peer {own} left: {reason}")
        self._leaving.append((own, self._peers.pop(own)))
        if len(self._leaving) > 1:
            return  # found while telling of another: the loop below comes to it, instead of a call in each call
        while self._leaving:
            number, gone = self._leaving[0]
            for other_number, other in list(self._peers.items()):
                if other_number in gone.told or other_number > number:
                    other.connection.send([left(number)])
            self._leaving.popleft()


def parse_size(text: str) -> int:
    """Bytes of a size as QEMU writes it: a number, perhaps with a fraction, and B, K, M, G, T, P or E."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|0[xX][0-9a-fA-F]+)([BKMGTPE]?)", text, re.IGNORECASE)
    if match is None or (match[2] and match[1][:2].lower() == "0x"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write bytes, or a number with K, M or G")
    unit = 1 << _SUFFIXES[match[2].upper()]
    size = int(float(match[1]) * unit) if "." in match[1] else int(match[1], 0 if "x" in text.lower() else 10) * unit
    if not 0 < size <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"size {text} is out of range: 1 byte to {MAX_SIZE >> 60}E")
    return size


def mapped_size(size: int) -> int:
    """The next power of two, one page at least: what QEMU's device can map."""
    return max(_PAGE, 1 << (size - 1).bit_length())


def open_memory(name: str, directory: str | None, size: int) -> Fd:
    """The shared memory: the POSIX object `name`, or a nameless file in `directory` (hugetlbfs, say).

    Raises OSError. Like QEMU's server it sets the object's size, whatever it was.
    """
    if directory is None and "/" in name.lstrip("/"):
        # as shm_open(3) refuses it: the name of an object is no path, and must not lead out of /dev/shm
        raise OSError(errno.EINVAL, "a shared memory object has no / in its name", name)
    if directory is not None:
        descriptor, path = tempfile.mkstemp(prefix="ivshmem.", dir=directory)
        os.unlink(path)
    else:
        path = f"/dev/shm/{name.lstrip('/')}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o700)
    memory = Fd(descriptor)
    if os.fstat(descriptor).st_size != size:
        try:
            os.ftruncate(descriptor, size)
        except OSError as error:
            raise OSError(error.errno, f"cannot have {size} bytes: {error.strerror}", path) from error
    return memory


def vector_count(text: str) -> int:
    """Argument of -n."""
    try:
        count = int(text, 0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
    if not 0 <= count <= MAX_VECTORS:
        raise argparse.ArgumentTypeError(f"{count} vectors: must be 0 to {MAX_VECTORS}")
    return count


def parser() -> argparse.ArgumentParser:
    """QEMU's options, letter for letter."""
    p = argparse.ArgumentParser(
        prog="ivshmem-server", description="ivshmem server, with the options of QEMU's contrib/ivshmem-server"
    )
    p.add_argument("-v", dest="verbose", action="store_true", help="verbose mode (with -F only)")
    p.add_argument("-F", dest="foreground", action="store_true", help="foreground (default: daemonize)")
    p.add_argument("-p", dest="pid_file", type=Path, metavar="pid-file", default="/var/run/ivshmem-server.pid",
                   help="where a daemon writes its process id (default: %(default)s)")  # fmt: skip
    p.add_argument("-S", dest="socket", type=Path, metavar="unix-socket-path", default="/tmp/ivshmem_socket",
                   help="socket to listen on (default: %(default)s)")  # fmt: skip
    where = p.add_mutually_exclusive_group()
    where.add_argument("-M", dest="name", metavar="shm-name", default="ivshmem",
                       help="POSIX shared memory object to use (default: %(default)s)")  # fmt: skip
    where.add_argument("-m", dest="directory", metavar="dir-name", help="where to create shared memory instead")
    p.add_argument("-l", dest="size", type=parse_size, metavar="size", default=4 << 20,
                   help="bytes of shared memory, rounded up to a power of two; K, M, G work (default: 4M)")  # fmt: skip
    p.add_argument("-n", dest="vectors", type=vector_count, metavar="nvectors", default=1,
                   help="vectors for each client (default: %(default)s)")  # fmt: skip
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Console script. Exit code 0 after SIGTERM or SIGINT, 1 when it cannot start, 2 for wrong options."""
    options = parser()
    args = options.parse_args(argv)
    if args.verbose and not args.foreground:
        options.error("-v needs -F: a daemon has no terminal to write to")
    wire.raise_descriptor_limit()
    with contextlib.ExitStack() as cleanup:
        try:
            listener = wire.listen(args.socket, socket.SOCK_STREAM, mode=None)
            cleanup.callback(listener.close)
            cleanup.callback(lambda: args.socket.unlink(missing_ok=True))
            memory = open_memory(args.name, args.directory, mapped_size(args.size))
        except (OSError, HostError) as error:
            sys.exit(f"ivshmem-server: cannot start: {error}")
        if not args.foreground:
            try:
                daemonize(args.pid_file)
            except OSError as error:
                sys.exit(f"ivshmem-server: cannot write the pid file: {error}")
            cleanup.callback(lambda: args.pid_file.unlink(missing_ok=True))
        loop = Loop()
        loop.stop_on_signals(signal.SIGTERM, signal.SIGINT)
        ContribServer(loop, listener, memory, args.vectors, verbose=log if args.verbose else lambda _: None)
        loop.run()


def daemonize(pid_file: Path) -> None:
    """Go on in a child without a terminal; the parent exits once the child's id is in `pid_file`.

    So whoever waited for the parent can connect and knows whom to stop. Raises OSError (in the child, whose
    standard error is still there) if the file cannot be written; then the parent exits with code 1.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    pid_file.write_text(f"{os.getpid()}\n")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    os.write(writer, b"+")
    os.close(writer)


if __name__ == "__main__":
    main()
