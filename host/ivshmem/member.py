"""The region server, member mode: one socket for each rw member of a region, fixed ids, eventfds that stay.

    python3 -S -m host.ivshmem.member --holder SOCKET --control SOCKET --sockets DIR
        [--send-timeout SECONDS] [--ready FD] [--lifeline FD]

May depend on the standard library, idc.layout and the rest of host. Differs from QEMU's own server so that a
member can die and come back without harm to the others:

- The eventfds belong to the region. A member that comes back has the same id and the same eventfds, and
  nobody is sent anything: a "peer left" message makes QEMU free what it never allocates again.
- That a member came or went is in the live word of the header page, and every vector of the others is rung.
- Everything is deposited in the fd holder before it is used: memory, eventfds, listening sockets and the
  clients' connections. After kill -9 the next server takes all of it over: no client notices, clients that
  connected meanwhile are served, and those that died meanwhile are marked gone. Only a client that was being
  greeted is cut off, as nobody knows how far that came; it connects again.

The incarnations and the header are kept here and in the holder: every rw member can write to the page.

Control requests (framed as host.wire says), one at a time:

    {"op": "create"} + memfd with a header page    reply "sockets": {member: path}, "memory": number of the
                                                   memfd in the holder
    {"op": "drop", "region": R}
    {"op": "list"}                                 reply "regions": {R: {member: {"present", "incarnation"}}},
                                                   "uuids": {R: hex}
    {"op": "ring", "region": R, "member": M, "vector": V}
    {"op": "describe", "region": R}                reply "page": the header as it was made, base64, "sockets" as above
    {"op": "open", "region": R, "uuid": hex}       reply + a copy of the memfd; refused if R is another region by now
    {"op": "watch"}                                from now on a datagram {"changed": true} on this connection whenever
                                                   `list` would answer otherwise; several changes may be one
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import mmap
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host import wire
from host.errors import HolderError, HostError, RegionError
from host.holder import Holder
from host.ivshmem.protocol import greeting
from host.ivshmem.server import SEND_TIMEOUT, Connection, Loop, log
from host.wire import Fd
from idc.layout import HEADER_BYTES, LayoutError, Member, RegionHeader, Rights, member_word, pack_header, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable

_NOTICE = json.dumps({"changed": True, "fds": 0}).encode()
_CONTROL_TIMEOUT = 5.0  # seconds; a control client that stops in the middle of a request is cut off


@dataclass(slots=True)
class Seat:
    """What an rw member has in a region for all its life, and its connection while it has one."""

    member: Member
    listener: socket.socket
    vectors: list[Fd]
    incarnation: int = 0
    connection: Connection | None = None
    greeted: bool = False

    @property
    def blob(self) -> str:
        """What the holder keeps beside the connection."""
        return json.dumps({"incarnation": self.incarnation, "greeted": self.greeted})


@dataclass(slots=True)
class ServedRegion:
    """One region: its checked header, its memory, its rw members by name."""

    header: RegionHeader
    memory: Fd
    words: memoryview
    seats: dict[str, Seat] = field(default_factory=dict)

    def mark(self, seat: Seat) -> None:
        """Write the seat's live word, in one store of 8 bytes."""
        word = member_word(seat.incarnation, present=seat.connection is not None)
        self.words[seat.member.word_offset // 8] = word

    def ring(self, *, but: Seat | None = None) -> None:
        """Ring every vector of every connected member (but one): look at the page, look at the rings."""
        for seat in self.seats.values():
            if seat is not but and seat.connection is not None:
                for vector in seat.vectors:
                    ring(vector)


def ring(vector: Fd) -> None:
    """Add one to an eventfd."""
    # A full counter means that it has been rung already, and nobody has looked yet.
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(vector.number, 1)


def map_words(memory: Fd) -> memoryview:
    """The header page as u64 words. Native order: `member_word` is little-endian like all we run on."""
    assert sys.byteorder == "little"
    return memoryview(mmap.mmap(memory.number, HEADER_BYTES)).cast("Q")


class Server:
    """All regions of one run."""

    def __init__(self, loop: Loop, holder: Holder, directory: Path, send_timeout: float = SEND_TIMEOUT) -> None:
        self._loop = loop
        self._holder = holder
        self._directory = directory
        self._send_timeout = send_timeout
        self._regions: dict[str, ServedRegion] = {}
        self.changed: Callable[[], None] = _nobody
        self._requests: dict[str, Callable[[dict[str, Any], list[int]], dict[str, Any]]] = {
            "create": self._create,
            "drop": self._drop,
            "list": self._list,
            "ring": self._ring,
            "describe": self._describe,
            "open": self._open,
        }

    def rejoin(self) -> None:
        """Take over all that an earlier server left in the holder. Raises HolderError."""
        names = self._holder.names()
        for name in names:
            if name.startswith("region/"):
                self._rejoin_region(name.removeprefix("region/"), names)
        for name in names:
            if name.startswith("seat/") and name.split("/")[1] not in self._regions:
                self._holder.drop(name)  # the earlier server died while it dropped the region

    def socket_path(self, region: str, member: str) -> Path:
        """Where the member's client connects."""
        return self._directory / f"{member}@{region}.sock"  # no name contains @

    def remove_sockets(self) -> None:
        """Unlink all members' sockets: when the run is over, not when only this server stops."""
        for region in self._regions.values():
            for name in region.seats:
                self.socket_path(region.header.name, name).unlink(missing_ok=True)

    # -- control requests

    def control(self, request: dict[str, Any], fds: list[int]) -> tuple[dict[str, Any], list[int]]:
        """Answer one control request; takes over `fds`. Returns the reply, and descriptors of ours that go with it."""
        handler = self._requests.get(str(request.get("op")))
        try:
            if handler is None:
                raise RegionError(f"no request {request.get('op')!r}")
            reply = {"ok": True} | handler(request, fds)
            return reply, reply.pop("give", [])
        except (HostError, LayoutError, OSError) as error:
            return {"ok": False, "error": str(error)}, []
        finally:
            wire.close_all(fds)

    def _create(self, _: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if len(fds) != 1:
            raise RegionError(f"create came with {len(fds)} descriptors instead of the memory")
        memory = Fd(fds.pop())
        page = os.pread(memory.number, HEADER_BYTES, 0)
        header = parse_header(page, os.fstat(memory.number).st_size)
        if header.name in self._regions:
            raise RegionError(f"region {header.name!r} exists already")
        words = map_words(memory)  # before anything is made that a refusal would have to take back
        writers = [member for member in header.members if member.rights is Rights.RW]
        listeners: list[socket.socket] = []
        try:
            for member in writers:
                path = self.socket_path(header.name, member.name)
                listeners.append(wire.listen(path, socket.SOCK_STREAM))
            vectors = [
                [Fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)) for _ in range(header.vectors)] for _ in writers
            ]
            numbers = [memory.number, *(sock.fileno() for sock in listeners)]
            numbers += [vector.number for group in vectors for vector in group]
            blob = json.dumps({"page": base64.b64encode(page).decode()})
            at = self._holder.put(f"region/{header.name}", numbers, blob)
        except BaseException:
            for member, sock in zip(writers, listeners, strict=False):
                self.socket_path(header.name, member.name).unlink(missing_ok=True)
                sock.close()
            raise
        region = ServedRegion(header, memory, words)
        for member, sock, group in zip(writers, listeners, vectors, strict=True):
            self._seat(region, Seat(member, sock, group))
        self._regions[header.name] = region
        self.changed()
        return {"sockets": self._sockets(region), "memory": at[0]}

    def _describe(self, request: dict[str, Any], _: list[int]) -> dict[str, Any]:
        region = self._region(request)
        return {"page": base64.b64encode(pack_header(region.header)).decode(), "sockets": self._sockets(region)}

    def _open(self, request: dict[str, Any], _: list[int]) -> dict[str, Any]:
        region = self._region(request)
        if request.get("uuid") != region.header.uuid.hex:
            raise RegionError(f"region {region.header.name!r} is not {request.get('uuid')} (any more)")
        return {"give": [region.memory.number]}

    def _sockets(self, region: ServedRegion) -> dict[str, str]:
        return {member: str(self.socket_path(region.header.name, member)) for member in region.seats}

    def _drop(self, request: dict[str, Any], _: list[int]) -> dict[str, Any]:
        region = self._region(request)
        name = region.header.name
        self._holder.drop(f"region/{name}")
        del self._regions[name]
        for member, seat in region.seats.items():
            self._loop.unwatch(seat.listener)
            self.socket_path(name, member).unlink(missing_ok=True)
            seat.listener.close()
            if seat.connection is not None:
                seat.connection.end("region dropped")
        region.seats.clear()  # ends a circle of references: the memory is free now, not when it is collected
        for entry in self._holder.names():
            if entry.startswith(f"seat/{name}/"):
                self._holder.drop(entry)
        self.changed()
        return {}

    def _list(self, _request: dict[str, Any], _fds: list[int]) -> dict[str, Any]:
        return {
            "regions": {
                name: {
                    member: {"present": seat.connection is not None, "incarnation": seat.incarnation}
                    for member, seat in region.seats.items()
                }
                for name, region in self._regions.items()
            },
            "uuids": {name: region.header.uuid.hex for name, region in self._regions.items()},
        }

    def _ring(self, request: dict[str, Any], _: list[int]) -> dict[str, Any]:
        region = self._region(request)
        seat = region.seats.get(str(request.get("member")))
        vector = request.get("vector")
        if seat is None:
            raise RegionError(f"region {region.header.name!r} has no rw member {request.get('member')!r}")
        if not isinstance(vector, int) or not 0 <= vector < len(seat.vectors):
            raise RegionError(f"vector {vector!r}: must be 0 to {len(seat.vectors) - 1}")
        ring(seat.vectors[vector])
        return {}

    def _region(self, request: dict[str, Any]) -> ServedRegion:
        name = str(request.get("region"))
        if name not in self._regions:
            raise RegionError(f"no region {name!r} here (there are: {', '.join(self._regions) or 'none'})")
        return self._regions[name]

    # -- members

    def _seat(self, region: ServedRegion, seat: Seat) -> None:
        region.seats[seat.member.name] = seat
        self._loop.accept_on(seat.listener, lambda sock: self._connected(region, seat, sock))

    def _connected(self, region: ServedRegion, seat: Seat, sock: socket.socket) -> None:
        where = f"region {region.header.name} member {seat.member.name}"
        if seat.connection is not None:
            seat.connection.probe()  # its end may be waiting behind this event
        if seat.connection is not None:
            log(f"{where}: refused a second connection while the first lives")
            sock.close()
            return
        seat.incarnation += 1
        seat.greeted = False
        try:
            # Before the client is told anything: from its first message on, its end must be seen by somebody.
            self._deposit(region, seat, sock)
        except HolderError as error:
            log(f"{where}: refused a connection: {error}")
            sock.close()
            return
        connection = self._watch(region, seat, sock)
        region.mark(seat)  # before the client can read it
        self.changed()
        others = {other.member.id: other.vectors for other in region.seats.values() if other is not seat}
        messages = greeting(seat.member.id, region.memory, seat.vectors, others)
        connection.send(messages, lambda: self._greeted(region, seat, sock))
        region.ring(but=seat)

    def _greeted(self, region: ServedRegion, seat: Seat, sock: socket.socket) -> None:
        """Note in the holder that the client has been told everything."""
        seat.greeted = True
        try:
            self._deposit(region, seat, sock)
        except HolderError as error:
            # The link works. It is only a restarted server that would cut it off.
            log(f"region {region.header.name} member {seat.member.name}: {error}")

    def _watch(self, region: ServedRegion, seat: Seat, sock: socket.socket) -> Connection:
        connection = Connection(self._loop, sock, lambda reason: self._gone(region, seat, reason), self._send_timeout)
        seat.connection = connection
        return connection

    def _gone(self, region: ServedRegion, seat: Seat, reason: str) -> None:
        where = f"region {region.header.name} member {seat.member.name}"
        log(f"{where} incarnation {seat.incarnation} is gone: {reason}")
        seat.connection = None
        region.mark(seat)
        self.changed()
        region.ring(but=seat)
        if region.header.name in self._regions:
            try:
                self._deposit(region, seat, None)
            except HolderError as error:
                log(f"{where}: {error}")

    def _deposit(self, region: ServedRegion, seat: Seat, sock: socket.socket | None) -> None:
        fds = [] if sock is None else [sock.fileno()]
        self._holder.put(f"seat/{region.header.name}/{seat.member.name}", fds, seat.blob)

    # -- after a restart

    def _rejoin_region(self, name: str, names: list[str]) -> None:
        held = self._holder.get(f"region/{name}")
        fds = [Fd(number) for number in held.fds]
        page = base64.b64decode(json.loads(held.blob)["page"])
        header = parse_header(page)
        region = ServedRegion(header, fds[0], map_words(fds[0]))
        writers = [member for member in header.members if member.rights is Rights.RW]
        vectors_at = 1 + len(writers)
        for n, member in enumerate(writers):
            listener = socket.socket(fileno=os.dup(fds[1 + n].number))
            vectors = fds[vectors_at + n * header.vectors : vectors_at + (n + 1) * header.vectors]
            self._seat(region, Seat(member, listener, vectors))
        self._regions[name] = region
        for seat in region.seats.values():
            if f"seat/{name}/{seat.member.name}" in names:
                self._rejoin_seat(region, seat)
            region.mark(seat)  # the earlier server may have died between the deposit and this
        region.ring()

    def _rejoin_seat(self, region: ServedRegion, seat: Seat) -> None:
        held = self._holder.get(f"seat/{region.header.name}/{seat.member.name}")
        state = json.loads(held.blob)
        seat.incarnation, seat.greeted = int(state["incarnation"]), bool(state["greeted"])
        if not held.fds:
            return
        connection = self._watch(region, seat, socket.socket(fileno=held.fds[0]))
        if not seat.greeted:
            # Nobody knows how far its messages came, and none may be sent twice.
            connection.end("the server died while it was greeting this client")


def _nobody() -> None:
    """Tell nobody."""


class _Control:
    """The control socket: one request and one reply at a time on each connection, and notices for who watches."""

    def __init__(self, loop: Loop, server: Server, path: Path) -> None:
        self._loop = loop
        self._server = server
        self._path = path
        self._watchers: set[socket.socket] = set()
        server.changed = self._changed
        self._listener = wire.listen(path, socket.SOCK_SEQPACKET)
        loop.accept_on(self._listener, self._accepted)

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        self._listener.close()

    def _accepted(self, sock: socket.socket) -> None:
        sock.settimeout(_CONTROL_TIMEOUT)
        self._loop.watch(sock, selectors.EVENT_READ, lambda _: self._request(sock))

    def _request(self, sock: socket.socket) -> None:
        try:
            request = wire.receive_message(sock)
            if request is not None and request[0].get("op") == "watch":
                wire.close_all(request[1])
                wire.send_message(sock, {"ok": True})
                self._watchers.add(sock)
                return
            if request is not None:
                wire.send_message(sock, *self._server.control(*request))
                return
        except (OSError, HostError) as error:
            log(f"control connection ended: {error}")
        self._end(sock)

    def _end(self, sock: socket.socket) -> None:
        self._watchers.discard(sock)
        self._loop.unwatch(sock)
        sock.close()

    def _changed(self) -> None:
        for sock in tuple(self._watchers):
            try:
                sock.send(_NOTICE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # a notice that says the same is still unread
            except OSError as error:
                log(f"a watcher is gone: {error.strerror}")
                self._end(sock)


def main() -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="host.ivshmem.member", description="region server, member mode")
    parser.add_argument("--holder", type=Path, required=True, metavar="SOCKET")
    parser.add_argument("--control", type=Path, required=True, metavar="SOCKET")
    parser.add_argument("--sockets", type=Path, required=True, metavar="DIR", help="private directory")
    parser.add_argument("--send-timeout", type=float, default=SEND_TIMEOUT, metavar="SECONDS")
    parser.add_argument("--ready", type=int, metavar="FD", help="write a newline here once requests are served")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="end, and unlink all sockets, when this does")
    args = parser.parse_args()
    wire.raise_descriptor_limit()
    loop = Loop()
    loop.stop_on_signals(signal.SIGTERM, signal.SIGINT)
    server = Server(loop, Holder(args.holder), args.sockets, args.send_timeout)

    def over(_: int) -> None:
        server.remove_sockets()
        loop.stop()

    try:
        server.rejoin()
        control = _Control(loop, server, args.control)
    except (HostError, LayoutError) as error:
        sys.exit(f"ivshmem-server: cannot start: {error}")
    if args.lifeline is not None:
        loop.watch(args.lifeline, selectors.EVENT_READ, over)
    if args.ready is not None:
        os.write(args.ready, b"\n")
        os.close(args.ready)
    try:
        loop.run()
    finally:
        control.close()


if __name__ == "__main__":
    main()
