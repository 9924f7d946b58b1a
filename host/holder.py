"""The fd holder: keeps named file descriptors, so that the server which uses them can die and restart.

    python3 -S -m host.holder SOCKET [--ready FD] [--lifeline FD]

memfds and eventfds live only as long as someone has them open, and cannot be put on a disk. So a process with
no logic of its own keeps them: it stores, gives out, lists and drops, and knows nothing of what it stores. It
may depend on the standard library, host.wire and host.errors. It answers only processes of its own user.

Requests (framed as host.wire says); replies carry {"ok": true} or {"ok": false, "error": text}:

    {"op": "put", "name": N, "blob": TEXT} + fds   store, in place of what had it; reply "at": fd numbers
    {"op": "get", "name": N}                       reply "blob", "at" + copies of the fds
    {"op": "list"}                                 reply "names", "pid"
    {"op": "drop", "name": N}                      forget and close

"at" are the numbers in the holder: /proc/PID/fd/NUMBER is how QEMU opens a memfd for a read-only member.

With --lifeline it ends when that pipe does, so it never outlives whoever started it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from host import wire
from host.errors import HolderError, HostError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Sequence

REQUEST_TIMEOUT: Final = 5.0  # seconds: one request is in memory at both ends, more means the client hangs


@dataclass(frozen=True, slots=True)
class Held:
    """One entry as `Holder.get` returns it. The caller owns `fds`; `at` are their numbers in the holder."""

    blob: str
    fds: list[int]
    at: list[int]


class Holder:
    """Client of the holder. Every call takes at most `timeout` seconds and raises HolderError when it fails.

    Connects again by itself after a failed call, so that a holder which was only slow is found again.
    """

    def __init__(self, path: Path, timeout: float = REQUEST_TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout
        self._sock: socket.socket | None = None

    def put(self, name: str, fds: Sequence[int], blob: str = "") -> list[int]:
        """Store descriptors and text in place of what had that name. Returns their numbers in the holder."""
        reply, _ = self._call({"op": "put", "name": name, "blob": blob}, fds)
        return [int(n) for n in reply["at"]]

    def get(self, name: str) -> Held:
        """Copies of what is stored under a name; HolderError if there is nothing."""
        reply, fds = self._call({"op": "get", "name": name})
        return Held(str(reply["blob"]), fds, [int(n) for n in reply["at"]])

    def names(self) -> list[str]:
        """All names, sorted."""
        return [str(name) for name in self._call({"op": "list"})[0]["names"]]

    def pid(self) -> int:
        """Process id of the holder."""
        return int(self._call({"op": "list"})[0]["pid"])

    def drop(self, name: str) -> None:
        """Forget a name; HolderError if there is no such name."""
        self._call({"op": "drop", "name": name})

    def close(self) -> None:
        """End the connection. What is stored stays."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _call(self, request: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        what = f"{request['op']} {request.get('name', '')}".rstrip()
        try:
            if self._sock is None:
                self._sock = wire.connect(self._path, self._timeout)
            wire.send_message(self._sock, request, fds)
            answer = wire.receive_message(self._sock)
        except (OSError, ProtocolError) as error:
            # A reply that comes late would be taken for the next one's: this connection is of no more use.
            self.close()
            raise HolderError(f"fd holder at {self._path} does not answer {what!r}: {error}") from error
        if answer is None:
            self.close()
            raise HolderError(f"fd holder at {self._path} closed the connection on {what!r}")
        reply, received = answer
        if not reply.get("ok"):
            wire.close_all(received)
            raise HolderError(f"fd holder refuses {what!r}: {reply.get('error')}")
        return reply, received


class _Store:
    """The holder's memory and its four requests."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[str, list[int]]] = {}

    def handle(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Answer one request. Takes over `fds`. Returns the reply and the descriptors to send with it."""
        name, op = request.get("name"), request.get("op")
        if op == "put" and isinstance(name, str) and isinstance(request.get("blob"), str):
            _, old = self._entries.get(name, ("", []))
            self._entries[name] = (request["blob"], fds)
            wire.close_all(old)
            return {"ok": True, "at": fds}, []
        wire.close_all(fds)
        if op == "list":
            return {"ok": True, "names": sorted(self._entries), "pid": os.getpid()}, []
        if op not in ("get", "drop") or not isinstance(name, str):
            return {"ok": False, "error": "no such request"}, []
        if name not in self._entries:
            return {"ok": False, "error": "no such name"}, []
        if op == "drop":
            _, old = self._entries.pop(name)
            wire.close_all(old)
            return {"ok": True}, []
        blob, held = self._entries[name]
        return {"ok": True, "blob": blob, "at": held}, held


def serve(path: Path, ready: int | None, lifeline: int | None) -> None:
    """Serve until SIGTERM or the end of the lifeline; then remove the socket."""
    listener = wire.listen(path, socket.SOCK_SEQPACKET)
    store = _Store()
    spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        if lifeline is not None:
            selector.register(lifeline, selectors.EVENT_READ)
        if ready is not None:
            os.write(ready, b"\n")
            os.close(ready)
        try:
            while True:
                for key, _ in selector.select():
                    if key.fileobj is listener:
                        spare = _accept(listener, selector, spare)
                    elif key.fileobj == lifeline:
                        return
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        if not _answer(key.fileobj, store):
                            selector.unregister(key.fileobj)
                            key.fileobj.close()
        finally:
            path.unlink(missing_ok=True)  # while the path is still ours
            listener.close()
            os.close(spare)


def _accept(listener: socket.socket, selector: selectors.BaseSelector, spare: int) -> int:
    """Accept a connection; refuse it when descriptors ran out, because what is held matters more than who asks.

    `spare` is an open descriptor, given up for a moment to refuse with: a connection that is left in the backlog would
    be reported again at once. Returns the new spare one.
    """
    try:
        sock, _ = listener.accept()
    except BlockingIOError:
        return spare
    except OSError as error:
        sys.stderr.write(f"holder: refused a connection: {error.strerror}\n")
        os.close(spare)
        with contextlib.suppress(OSError):
            listener.accept()[0].close()
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    if not wire.same_user(sock):
        sock.close()
        return spare
    sock.settimeout(REQUEST_TIMEOUT)
    selector.register(sock, selectors.EVENT_READ)
    return spare


def _answer(sock: socket.socket, store: _Store) -> bool:
    """Serve one request; False when the connection ended, or must because it broke the protocol or hangs."""
    try:
        request = wire.receive_message(sock)
        if request is None:
            return False
        reply, fds = store.handle(*request)
        wire.send_message(sock, reply, fds)
    except (OSError, ProtocolError) as error:
        sys.stderr.write(f"holder: connection ended: {error}\n")
        return False
    return True


def _stop(*_: object) -> None:
    raise SystemExit(0)


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="host.holder", description="keeps file descriptors for the region server")
    parser.add_argument("socket", type=Path)
    parser.add_argument("--ready", type=int, metavar="FD", help="write a newline here once requests are served")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="end when this pipe does")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    wire.raise_descriptor_limit()
    try:
        serve(args.socket, args.ready, args.lifeline)
    except HostError as error:
        sys.exit(f"holder: {error}")


if __name__ == "__main__":
    main()
