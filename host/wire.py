"""Small things that holder, server and their clients share: requests with file descriptors, socket paths.

May depend on the standard library and host.errors. A request or reply is a JSON object in one datagram of a
SOCK_SEQPACKET Unix socket. Its field "fds" says how many descriptors come with it; the kernel takes at most
SCM_MAX_FD (253) in one datagram, so the rest follow in datagrams whose only content is b"+".
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import stat
import struct
from typing import TYPE_CHECKING, Any, Final

from host.errors import ProtocolError, SocketPathError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

FDS_PER_DATAGRAM: Final = 250
MAX_FDS: Final = 16384
MAX_DATAGRAM: Final = 128 * 1024
SUN_PATH_BYTES: Final = 108  # struct sockaddr_un, with the NUL that ends the path

_CREDENTIALS = struct.Struct("iII")


class Fd:
    """A file descriptor that is closed when nothing refers to this object any more.

    A descriptor that waits in a send queue must stay open, and its number must not come to mean another file,
    although the peer it belonged to is gone. Reference counting says exactly when that is over.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def fileno(self) -> int:
        """The descriptor's number."""
        return self.number

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # the interpreter may be on its way out
            os.close(self.number)


def send_message(sock: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one object and its descriptors. Raises OSError (TimeoutError if `sock` has a timeout)."""
    data = json.dumps(message | {"fds": len(fds)}).encode()
    if len(data) > MAX_DATAGRAM or len(fds) > MAX_FDS:
        raise ProtocolError(f"a message of {len(data)} bytes with {len(fds)} descriptors is too large")
    for start in range(0, max(len(fds), 1), FDS_PER_DATAGRAM):
        part = list(fds[start : start + FDS_PER_DATAGRAM])
        socket.send_fds(sock, [b"+" if start else data], part)


def receive_message(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive what `send_message` sent; None at the end of the connection.

    The caller owns the descriptors (close-on-exec). Raises ProtocolError if it is something else, then
    nothing that came with it stays open; OSError as recvmsg(2) does.
    """
    fds: list[int] = []
    try:
        data = _receive_datagram(sock, fds)
        if not data:
            return None
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"not JSON: {data[:40]!r}") from error
        if not isinstance(message, dict) or type(message.get("fds")) is not int:
            raise ProtocolError(f"not a message: {data[:40]!r}")
        count = message.pop("fds")
        if not 0 <= count <= MAX_FDS:
            raise ProtocolError(f"a message claims {count} descriptors")
        while len(fds) < count:
            before = len(fds)
            if _receive_datagram(sock, fds) != b"+" or len(fds) == before:
                raise ProtocolError(f"{len(fds)} of {count} descriptors came")
        if len(fds) != count:
            raise ProtocolError(f"{len(fds)} descriptors came instead of {count}")
    except BaseException:
        close_all(fds)
        raise
    return message, fds


def _receive_datagram(sock: socket.socket, fds: list[int]) -> bytes:
    data, received, flags, _ = socket.recv_fds(sock, MAX_DATAGRAM, FDS_PER_DATAGRAM + 3, socket.MSG_CMSG_CLOEXEC)
    fds += received
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        raise ProtocolError("a message was cut: raise the limit of open files (ulimit -n)")
    return data


def close_all(fds: Iterable[int]) -> None:
    """Close descriptors that may not be kept."""
    for fd in fds:
        os.close(fd)


def raise_descriptor_limit() -> None:
    """Lift the soft limit of open files to the hard one: the usual 1024 is a dozen busy regions."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def same_user(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket is (or was, when it connected) a process of our own user."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    return bool(uid == os.geteuid())


def check_socket_path(path: Path) -> None:
    """Raise SocketPathError if a Unix socket cannot have that path because of its length."""
    length = len(os.fsencode(path))
    if length >= SUN_PATH_BYTES:
        raise SocketPathError(
            f"socket path {path} has {length} bytes, the kernel takes at most {SUN_PATH_BYTES - 1}: "
            "use a run directory with a shorter path"
        )


def listen(path: Path, kind: socket.SocketKind, mode: int | None = 0o600, backlog: int = 16) -> socket.socket:
    """A listening Unix socket at `path`, non-blocking, with that mode (None: what the umask leaves).

    A socket left there by a dead process is replaced; one that still answers, or another kind of file, is a
    SocketPathError. The directory must be private to the user: between bind and chmod the umask decides.
    """
    check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        try:
            sock.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise SocketPathError(f"cannot bind {path}: {error.strerror}") from error
            _remove_stale(path, kind)
            sock.bind(str(path))
        if mode is not None:
            path.chmod(mode)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise SocketPathError(f"{path} exists and is no socket: remove it, or choose another path")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise SocketPathError(f"{path} exists and does not refuse connections: {error.strerror}") from error
    raise SocketPathError(f"{path} is in use by a running process")


def connect(path: Path, timeout: float) -> socket.socket:
    """A SEQPACKET connection whose calls each take at most `timeout` seconds. Raises OSError."""
    check_socket_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(timeout)
        sock.connect(str(path))
    except BaseException:
        sock.close()
        raise
    return sock
