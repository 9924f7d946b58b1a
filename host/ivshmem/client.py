"""A host process as an ivshmem peer: it maps the memory, rings peers and is rung, as a VM does by its device.

May depend on the standard library, idc, host.errors and host.ivshmem.protocol. Works with both of our server
modes and with any other server of the protocol.

    with connect(region.socket("host")) as peer:          # our own region: its header page says all
        peer.ring(0, vector=1)
        peer.wait(vector=0, timeout=5)

    with connect("/tmp/ivshmem_socket", vectors=2) as peer: ...    # any other server

`join` gives the same connection as an `idc.region.Region`, which channels and transfers are written against.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from host import wire
from host.errors import PeerError, ProtocolError
from host.ivshmem.protocol import Client, Joined, Left, State
from idc.layout import HEADER_BYTES, LayoutError, parse_header

if TYPE_CHECKING:
    from idc.layout import RegionHeader
    from idc.region import Region
    from idc.transport.shared import Regions, SharedPort

CONNECT_TIMEOUT = 10.0


class Peer:
    """An established connection. Made by `connect`.

    Attributes:
        id: own id; what others ring is (id, vector).
        memory: the whole region, shared and writable.
        size: its bytes.
    """

    def __init__(self, sock: socket.socket, client: Client) -> None:
        assert client.own is not None
        assert client.memory is not None
        self._sock = sock
        self._client = client
        self.id = client.own
        try:
            self.size = os.fstat(client.memory).st_size
            self.memory = mmap.mmap(client.memory, self.size)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"what the server calls shared memory cannot be mapped: {error}") from error

    @property
    def events(self) -> tuple[int, ...]:
        """Own eventfds by vector: readable when rung. They belong to this object."""
        return tuple(self._client.vectors.get(self.id, ()))

    @property
    def peers(self) -> dict[int, tuple[int, ...]]:
        """The others' eventfds by id and vector, as far as the server has told (see `update`)."""
        return {peer: tuple(fds) for peer, fds in self._client.vectors.items() if peer != self.id}

    def fileno(self) -> int:
        """The connection to the server: readable when `update` has something to do."""
        return self._sock.fileno()

    def ring(self, peer: int, vector: int) -> None:
        """Ring a vector of a peer. Raises PeerError if there is none (QEMU drops that in silence)."""
        fd = self.bell(peer, vector)
        with contextlib.suppress(BlockingIOError):  # its counter is full, so it has been rung already
            os.eventfd_write(fd, 1)

    def bell(self, peer: int, vector: int) -> int:
        """The eventfd behind a peer's vector, which stays this object's. Raises PeerError if there is none."""
        fds = self._client.vectors.get(peer, [])
        if not 0 <= vector < len(fds):
            raise PeerError(f"peer {peer} has {len(fds)} vectors here, none of them is number {vector}")
        return fds[vector]

    def wait(self, vector: int, timeout: float) -> int:
        """Wait until an own vector is rung; how often it was since the last look, 0 after `timeout` seconds."""
        fd = self.bell(self.id, vector)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll(timeout * 1000):
            return 0
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0  # another thread took it

    def update(self, timeout: float = 0.0) -> list[Joined | Left]:
        """Take what the server says of peers that come and go, waiting up to `timeout` seconds for the first.

        A server in member mode says nothing after the greeting. The eventfds of those that left are closed.
        Raises PeerError when the server ended the connection (memory and doorbells go on working), and
        ProtocolError when it sent rubbish.
        """
        events: list[Joined | Left] = []
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        while poller.poll(0 if events else timeout * 1000):
            event = receive_event(self._sock, self._client)
            if isinstance(event, Left):
                wire.close_all(event.descriptors)
            if event is not None:
                events.append(event)
        return events

    def close(self) -> None:
        """Leave: unmap, close all descriptors and the connection. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._sock.close()
        wire.close_all(self._client.take_all())
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(path: str | Path, *, vectors: int | None = None, timeout: float = CONNECT_TIMEOUT) -> Peer:
    """Connect to a server's socket and take its greeting; `timeout` (seconds) bounds all of it.

    The protocol does not say when the greeting is over. It is when the own vectors, which come last, are
    complete; how many they are is in the header page of our own regions, and must be given for other servers.

    Raises PeerError (nobody serves there, connection refused or ended, too late), ProtocolError, or
    LayoutError when `vectors` is not given and the memory has no valid header page.
    """
    wire.check_socket_path(Path(path))
    deadline = time.monotonic() + timeout
    client = Client()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.settimeout(timeout)
            sock.connect(str(path))
        except OSError as error:
            raise PeerError(f"no ivshmem server at {path}: {error.strerror or error}") from error
        while not _complete(client, vectors):
            try:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                sock.settimeout(left)
                receive_event(sock, client)
            except TimeoutError as error:
                raise PeerError(
                    f"the greeting from {path} was not complete after {timeout:g} s: in state {client.state.name}, "
                    f"with {len(client.vectors.get(client.own or 0, []))} own vectors"
                ) from error
            if vectors is None and client.memory is not None:
                vectors = _vectors_in_header(client.memory)
        sock.settimeout(None)
        return Peer(sock, client)
    except BaseException:
        sock.close()
        wire.close_all(client.take_all())
        raise


def join(path: str | Path, *, timeout: float = CONNECT_TIMEOUT, header: RegionHeader | None = None) -> Region:
    """Connect as `connect` does and present the region as `idc` sees it; closing it leaves the region.

    `header` is for one who has the header from who made the region: its page, which other members may have written
    over, is not looked at then.
    """
    # Here and not above: idc.ring needs the compiled core, which a plain peer can do without.
    from idc.region import Region
    from idc.ring import Bell

    peer = connect(path, vectors=None if header is None else header.vectors, timeout=timeout)
    try:

        def bell(to: int, vector: int) -> Bell:
            return Bell.eventfd(peer.bell(to, vector))

        return Region(peer.memory, peer.id, peer.events, bell, peer.close, header)
    except BaseException:
        peer.close()
        raise


_regions: list[Regions] = []


def port(address: str) -> SharedPort:
    """Where an endpoint of a host process meets its peer: SOCKET/CHANNEL.

    Raises MisuseError, NotConnectedError, and as `join`.
    """
    from idc.transport.shared import Regions

    if not _regions:
        _regions.append(Regions(join))
    return _regions[0].port(address)


def _complete(client: Client, vectors: int | None) -> bool:
    if client.state is not State.PEERS or client.own is None or vectors is None:
        return False
    return len(client.vectors.get(client.own, ())) >= vectors


def _vectors_in_header(memory: int) -> int:
    try:
        return parse_header(os.pread(memory, HEADER_BYTES, 0), os.fstat(memory).st_size).vectors
    except OSError as error:
        raise ProtocolError(f"what the server calls shared memory cannot be read: {error.strerror}") from error
    except LayoutError as error:
        error.add_note("a region of another server: say how many vectors it gives each client")
        raise


def receive_event(sock: socket.socket, client: Client) -> Joined | Left | None:
    """Receive up to one message, with its descriptor."""
    try:
        data, fds, flags, _ = socket.recv_fds(sock, client.wanted, 4, socket.MSG_CMSG_CLOEXEC)
    except TimeoutError:
        raise
    except OSError as error:
        raise PeerError(f"the connection to the ivshmem server failed: {error.strerror}") from error
    if not data:
        raise PeerError("the ivshmem server ended the connection (its log says why)")
    if flags & socket.MSG_CTRUNC:
        # Before it is decoded: a vector without its descriptor would read as a peer that left.
        wire.close_all(fds)
        raise ProtocolError("a descriptor was lost: raise the limit of open files (ulimit -n)")
    event = client.feed(data, fds)
    if isinstance(event, Joined):
        # Whoever fills a peer's counter must not block on it. (QEMU does the same to what it receives.)
        os.set_blocking(event.descriptor, False)
    return event
