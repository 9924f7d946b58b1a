"""What both server modes share: an event loop, and connections that can neither block nor harm the server.

May depend on the standard library, host.errors, host.wire and host.ivshmem.protocol.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import selectors
import signal
import socket
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from host import wire
from host.ivshmem.protocol import MESSAGE_BYTES, Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from host.wire import Fd

SEND_TIMEOUT: Final = 10.0  # seconds in which a client must take what it was sent; QEMU's main loop needs ms
_ACCEPT_PAUSE = 0.5  # seconds
_RETRY = 0.02  # seconds until a send is tried again that failed for want of something no event tells of


def log(text: str) -> None:
    """One line on standard error, which is the server's log."""
    sys.stderr.write(f"ivshmem-server: {text}\n")
    sys.stderr.flush()


class Loop:
    """A selector with callbacks and timers. One thread; nothing in it may block."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._running = False

    def watch(self, sock: socket.socket | int, events: int, ready: Callable[[int], None]) -> None:
        """Call `ready(events that hold)` whenever one of `events` (selectors.EVENT_*) holds for `sock`."""
        if sock in self._selector.get_map():
            self._selector.modify(sock, events, ready)
        else:
            self._selector.register(sock, events, ready)

    def unwatch(self, sock: socket.socket | int) -> None:
        """Stop watching; to be called before the socket is closed."""
        if sock in self._selector.get_map():
            self._selector.unregister(sock)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call once after that time. There is no cancel: the callee looks whether it still matters."""
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._count), call))

    def stop_on_signals(self, *numbers: signal.Signals) -> None:
        """Stop when one of these comes, between two callbacks instead of in the middle of one."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        self._signal_pair = (reader, writer)
        self.watch(reader, selectors.EVENT_READ, lambda _: self.stop())

    def accept_on(
        self, listener: socket.socket, accepted: Callable[[socket.socket], None], *, any_user: bool = False
    ) -> None:
        """Call `accepted` with each connection that comes from a process of our own user (or of any)."""

        self.watch(listener, selectors.EVENT_READ, lambda _: self._accept(listener, accepted, any_user))

    def _accept(self, listener: socket.socket, accepted: Callable[[socket.socket], None], any_user: bool) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return  # it was taken back
        except OSError as error:
            # Out of descriptors or memory. The connection stays in the backlog and would be reported again at
            # once: look away for a while instead of spinning.
            log(f"cannot accept: {error.strerror}")
            self.unwatch(listener)
            self.after(_ACCEPT_PAUSE, lambda: self._resume(listener, accepted, any_user))
            return
        if any_user or wire.same_user(sock):
            accepted(sock)
        else:
            sock.close()

    def _resume(self, listener: socket.socket, accepted: Callable[[socket.socket], None], any_user: bool) -> None:
        if listener.fileno() >= 0:  # else it was closed meanwhile
            self.accept_on(listener, accepted, any_user=any_user)

    def stop(self) -> None:
        """Make `run` return after the callbacks at hand."""
        self._running = False

    def run(self) -> None:
        """Serve until `stop`."""
        self._running = True
        while self._running:
            wait = None if not self._timers else max(0.0, self._timers[0][0] - time.monotonic())
            for key, events in self._selector.select(wait):
                # A callback before this one may have stopped watching it, or watch another in its place.
                if self._selector.get_map().get(key.fd) is key:
                    key.data(events)
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        """Release the selector and forget the timers; sockets stay open."""
        self._selector.close()
        self._timers.clear()


class Connection:
    """One client's connection: sends in order without blocking, and ends when the client misbehaves.

    It ends, once, with a call of `ended(reason)`, when the client closes it, writes anything at all (the
    protocol gives it nothing to say), or does not take its messages within `timeout` seconds. The socket is
    shut down then, not only closed: the fd holder may have a copy of it.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, ended: Callable[[str], None], timeout: float = SEND_TIMEOUT
    ) -> None:
        sock.setblocking(False)
        self._loop = loop
        self.sock = sock
        self._ended = ended
        self._timeout = timeout
        self._queue: deque[Message[Fd]] = deque()
        self._batch = 0
        self._sent: Callable[[], None] | None = None
        self.open = True
        loop.watch(sock, selectors.EVENT_READ, self._ready)

    def send(self, messages: Iterable[Message[Fd]], sent: Callable[[], None] | None = None) -> None:
        """Queue messages and send what the socket takes now; call `sent` once the socket has taken all.

        May end the connection; then `sent` is not called.
        """
        if not self.open:
            return
        self._sent = sent
        idle = not self._queue
        self._queue.extend(messages)
        if idle and self._queue:
            self._batch += 1
            batch = self._batch
            self._loop.after(self._timeout, lambda: self._late(batch))
            self._flush()

    def end(self, reason: str) -> None:
        """End the connection; `ended` is called unless that happened before."""
        if not self.open:
            return
        self.open = False
        self._queue.clear()
        self._loop.unwatch(self.sock)
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the client was faster
                raise
        self.sock.close()
        # Timers may refer to this object for a while: what it referred to must not have to wait for them.
        ended, self._ended, self._sent = self._ended, lambda _: None, None
        ended(reason)

    def probe(self) -> None:
        """Look now whether the client closed or wrote; ends the connection if so."""
        if not self.open:
            return
        try:
            data = self.sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            self.end(f"connection failed: {error.strerror}")
            return
        self.end("client wrote, which the protocol forbids" if data else "client closed the connection")

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_READ:
            self.probe()
        if events & selectors.EVENT_WRITE and self.open:
            self._flush()

    def _flush(self) -> None:
        while self._queue and self.open:
            message = self._queue[0]
            fds = [] if message.descriptor is None else [message.descriptor.number]
            try:
                sent = socket.send_fds(self.sock, [message.encode()], fds)
            except BlockingIOError:
                self._loop.watch(self.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, self._ready)
                return
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    # The kernel bounds the descriptors that a user has under way, in all sockets together:
                    # clients that do not read are in this one's way until their time is over.
                    self._loop.after(_RETRY, self._flush)
                    return
                self.end(f"cannot send to the client: {error.strerror}")
                return
            if sent != MESSAGE_BYTES:
                self.end(f"the socket took {sent} bytes of a message")
                return
            self._queue.popleft()
        if not self.open:
            return
        self._loop.watch(self.sock, selectors.EVENT_READ, self._ready)
        if self._sent is not None:
            call, self._sent = self._sent, None
            call()

    def _late(self, batch: int) -> None:
        if self._queue and self._batch == batch:
            self.end(f"client did not take its messages within {self._timeout:g} s")
