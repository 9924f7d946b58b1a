"""Two endpoints in one process, in one thread or in two: frames through queues. Depends on idc.errors and idc.region.

    front, back = meeting()
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from idc.errors import MisuseError, PeerGoneError
from idc.region import wait_event
from idc.transport.base import NO_MASKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc.trace.hook import EndpointTrace

#: Frames of each direction, and bytes of a frame, unless asked for otherwise.
FRAMES: Final = 1024
FRAME_BYTES: Final = 1 << 16


class _Way:
    """One direction of one connection."""

    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.ended = False


class LocalCarrier:
    """See `idc.transport.base.Carrier`."""

    near = True
    flushes = False
    trips = None
    line = None

    def __init__(self, mine: LocalPort, peer: LocalPort, out: _Way, back: _Way, flows: tuple[int, int]) -> None:
        self.capacity = mine.frames
        self.frame_bytes = mine.frame_bytes
        self.flows = flows
        self.doorbells = 0
        self._mine = mine
        self._peer = peer
        self._out = out
        self._in = back
        self._closed = False
        self.posted = False

    def post(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        if self._in.ended:
            raise PeerGoneError("the peer closed the connection")
        self._out.frames.append(frame + body if body else frame)

    @property
    def rings(self) -> LocalCarrier:
        """See there."""
        return self

    def flush(self) -> None:
        """See there."""
        self.doorbells += 1
        self._peer.wake()

    def send(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        self.post(frame, body)
        self.flush()

    def traced(self, trace: EndpointTrace | None) -> bool:
        """See there."""
        del trace
        return False

    def exchange(self, frame: bytes, body: bytes, timeout: float) -> Sequence[bytes]:
        """See there."""
        self.posted = False
        self.send(frame, body)
        self.posted = True
        if not self._in.frames and not self._in.ended and timeout > 0:
            self._mine.wait(timeout)
        self.posted = False
        return (self._in.frames.popleft(),) if self._in.frames else ()

    def take(self, timeout: float) -> Sequence[bytes]:
        """See there."""
        if not self._in.frames and not self._in.ended and timeout > 0:
            self._mine.wait(timeout)
        ended = self._in.ended  # before the look at the queue: what was posted before the end is seen first
        taken = []
        while self._in.frames:
            taken.append(self._in.frames.popleft())
        if not taken and ended:
            raise PeerGoneError("the peer closed the connection")
        return taken

    def arm(self) -> bool:
        """See there."""
        return not self._in.frames and not self._in.ended

    def close(self) -> None:
        """See there."""
        self._out.ended = True
        self._peer.wake()


class LocalPort:
    """See `idc.transport.base.Port`. Made by `meeting`."""

    regions = ()
    masking = NO_MASKING
    patience: float | None = None

    def __init__(self, lock: threading.RLock, frames: int, frame_bytes: int) -> None:
        self.frames = frames
        self.frame_bytes = frame_bytes
        self._lock = lock
        self._peer: LocalPort | None = None
        self._there = False
        self._wants = False
        self._ready: LocalCarrier | None = None
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def look(self) -> bool:
        """See there."""
        with self._lock:
            if not self._there:
                self._there = True
                self._other.wake()
            return self._other._there

    def connection(self) -> LocalCarrier | None:
        """See there."""
        peer = self._other
        with self._lock:
            if self._ready is None:
                self._wants = True
                if not peer._wants:
                    return None
                out, back = _Way(), _Way()
                flows = secrets.randbits(64), secrets.randbits(64)
                self._ready = LocalCarrier(self, peer, out, back, flows)
                peer._ready = LocalCarrier(peer, self, back, out, (flows[1], flows[0]))
                self._wants = peer._wants = False
                peer.wake()
            carrier, self._ready = self._ready, None
            return carrier

    def wait(self, timeout: float) -> None:
        """See there."""
        wait_event(self._event, timeout)

    def fileno(self) -> int:
        """See there."""
        return self._event

    def wake(self) -> None:
        """Something is new for this side."""
        with self._lock:  # or its own thread could close the descriptor, and another file get its number
            if self._event >= 0:
                os.eventfd_write(self._event, 1)

    def close(self) -> None:
        """See there."""
        with self._lock:
            if self._event < 0:
                return
            self._there = self._wants = False
            pending, self._ready = self._ready, None
            os.close(self._event)
            self._event = -1
        if pending is not None:
            pending.close()
        self._other.wake()

    @property
    def closed(self) -> bool:
        """Whether nobody uses this end."""
        return self._event < 0

    def reopen(self) -> None:
        """Make it usable again after `close`."""
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    @property
    def _other(self) -> LocalPort:
        assert self._peer is not None
        return self._peer


def meeting(*, frames: int = FRAMES, frame_bytes: int = FRAME_BYTES) -> tuple[LocalPort, LocalPort]:
    """A place for two endpoints of this process to meet."""
    lock = threading.RLock()
    one, two = (LocalPort(lock, frames, frame_bytes) for _ in range(2))
    one._peer, two._peer = two, one
    return one, two


_places: dict[str, tuple[LocalPort, LocalPort]] = {}
_places_lock = threading.Lock()


def port(name: str) -> LocalPort:
    """The free one of the two ends of a place; the place is forgotten when both are closed again.

    Raises MisuseError when two endpoints are there already.
    """
    with _places_lock:
        ends = _places.get(name)
        if ends is None or all(end.closed for end in ends):
            ends = _places[name] = meeting()
            for end in ends:
                end.close()
        for end in ends:
            if end.closed:
                end.reopen()
                return end
    raise MisuseError(f"address local:{name}: two endpoints meet there already")
