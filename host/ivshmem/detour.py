"""Doorbells that are dropped, doubled or late, on purpose: a way round between one member and the region server.

    faults = Doorbells(drop=0.1, delay=(0.0, 0.02), seed=7)
    with Detour(region.socket("front"), path, {1: faults}) as detour:    # what front rings at member 1
        ...                                             # front connects to `path`: a QEMU, or client.join
        detour.counts[1, 0]                             # vector 0 of member 1

It relays the server's messages and gives the member eventfds of its own in place of those behind the peers' vectors;
a doorbell that comes out of one of them goes on to the real one as the faults say. Neither QEMU nor server know. What
the host rings is not touched. May depend on the standard library, host.errors, host.wire and the rest of host.ivshmem.

Every doorbell of a vector has its fate from the seed and its own number, so a run can be repeated; how many doorbells
there are depends on when who sleeps. Delays are rounded up to whole milliseconds. docs/protocol.md says what a lost
doorbell costs: time, never correctness.
"""

from __future__ import annotations

import contextlib
import os
import random
import selectors
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from host import wire
from host.errors import HostError, RegionError
from host.ivshmem.client import receive_event
from host.ivshmem.protocol import MEMORY, VERSION, Client, Joined, Left, Message, State
from host.ivshmem.server import Connection, Loop, log
from host.wire import Fd

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_CONNECT_TIMEOUT: Final = 5.0
_MOST_AT_ONCE: Final = 1000  # a member may put any number into its eventfd: more than this is one full counter


@dataclass(frozen=True, slots=True)
class Doorbells:
    """What happens to the doorbells from one member to another.

    Attributes:
        drop: probability that a doorbell is lost.
        double: probability that one which is not lost comes twice.
        delay: (least, most) seconds until it comes; drawn evenly, for each copy of it.
        seed: of all decisions.

    Raises:
        RegionError: a probability that is none, or a delay that is negative or ends before it starts.
    """

    drop: float = 0.0
    double: float = 0.0
    delay: tuple[float, float] = (0.0, 0.0)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("drop", self.drop), ("double", self.double)):
            if not 0.0 <= value <= 1.0:
                raise RegionError(f"doorbells: {name}={value} is no probability")
        least, most = self.delay
        if not 0.0 <= least <= most < float("inf"):
            raise RegionError(f"doorbells: delay={self.delay} must be (least, most) seconds, not negative")

    def fates(self, sender: int, receiver: int, vector: int) -> Iterator[tuple[float, ...]]:
        """For one doorbell after the other: seconds until each copy of it comes; empty when it is lost. Endless."""
        dice = random.Random(f"{self.seed}/{sender}/{receiver}/{vector}")
        while True:
            # The same number of draws for each, so that changing one probability leaves the other decisions alone.
            lost, twice = dice.random() < self.drop, dice.random() < self.double
            delays = dice.uniform(*self.delay), dice.uniform(*self.delay)
            yield () if lost else delays if twice else delays[:1]


@dataclass(slots=True)
class Counts:
    """Doorbells of one vector: rung by the sender; of these lost, and doubled; copies delayed; copies passed on."""

    rung: int = 0
    dropped: int = 0
    doubled: int = 0
    delayed: int = 0
    passed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rung + other.rung, self.dropped + other.dropped, self.doubled + other.doubled,
                      self.delayed + other.delayed, self.passed + other.passed)


class _Bell:
    """One vector of one peer, over all connections of the member."""

    def __init__(self, fates: Iterator[tuple[float, ...]]) -> None:
        self.counts = Counts()
        self._fates = fates

    def rung(self, loop: Loop, proxy: Fd, target: Fd) -> None:
        """Take what came out of `proxy`, and send each doorbell of it its way."""
        try:
            number = os.eventfd_read(proxy.number)
        except BlockingIOError:
            return
        for _ in range(min(number, _MOST_AT_ONCE)):
            fate = next(self._fates)
            self.counts.rung += 1
            self.counts.dropped += not fate
            self.counts.doubled += len(fate) > 1
            for delay in fate:
                if delay > 0:
                    self.counts.delayed += 1
                    loop.after(delay, lambda: self._pass_on(target))
                else:
                    self._pass_on(target)

    def _pass_on(self, target: Fd) -> None:
        self.counts.passed += 1
        with contextlib.suppress(BlockingIOError):  # a full counter: it is rung already
            os.eventfd_write(target.number, 1)


class Detour:
    """Stands between one member and the server of its region, in a thread of this process.

    Attributes:
        path: where the member connects, in place of the server's own socket.

    Args:
        server: the member's socket at the region server.
        path: becomes `path`.
        faults: by the id of the member whose doorbell is rung; the others' are handed on as they are.

    Raises:
        SocketPathError: nothing can listen at `path`.
    """

    def __init__(self, server: Path, path: Path, faults: Mapping[int, Doorbells]) -> None:
        self.path = path
        self._server = server
        self._faults = dict(faults)
        self._bells: dict[tuple[int, int], _Bell] = {}
        self._loop = Loop()
        self._listener = wire.listen(path, socket.SOCK_STREAM)
        self._links: set[_Link] = set()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._loop.watch(self._end, selectors.EVENT_READ, lambda _: self._loop.stop())
        self._loop.accept_on(self._listener, self._accepted)
        self._thread = threading.Thread(target=self._loop.run, name=f"detour {path.name}", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> dict[tuple[int, int], Counts]:
        """What happened so far, by (member rung, vector)."""
        return {key: bell.counts for key, bell in list(self._bells.items())}

    @property
    def receivers(self) -> tuple[int, ...]:
        """Ids of the members for whom this member's doorbells have faults."""
        return tuple(self._faults)

    def total(self, receiver: int) -> Counts:
        """What happened so far to all doorbells for one member."""
        return sum((counts for (member, _), counts in self.counts.items() if member == receiver), Counts())

    def close(self) -> None:
        """Cut the member off and end the thread; doorbells still under way are lost. Idempotent."""
        if self._end < 0:
            return
        os.eventfd_write(self._end, 1)
        self._thread.join()
        for link in list(self._links):
            link.end("the detour was closed")
        self._listener.close()
        self.path.unlink(missing_ok=True)
        self._loop.close()
        os.close(self._end)
        self._end = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accepted(self, sock: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.settimeout(_CONNECT_TIMEOUT)
            server.connect(str(self._server))
            server.setblocking(False)
        except OSError as error:
            log(f"detour: no server at {self._server}: {error.strerror or error}")
            server.close()
            sock.close()
            return
        self._links.add(_Link(self, sock, server))


class _Link:
    """One connection of the member, and ours to the server for it."""

    def __init__(self, detour: Detour, sock: socket.socket, server: socket.socket) -> None:
        self._detour = detour
        self._loop = detour._loop
        self._server = server
        self._client = Client()
        self._proxies: list[Fd] = []
        self._member = Connection(self._loop, sock, self._gone)
        self._loop.watch(server, selectors.EVENT_READ, lambda _: self._relay())

    def end(self, reason: str) -> None:
        """Cut both ends."""
        self._member.end(reason)

    def _gone(self, _reason: str) -> None:
        self._loop.unwatch(self._server)
        self._server.close()
        for proxy in self._proxies:
            self._loop.unwatch(proxy.number)
        self._proxies.clear()
        wire.close_all(self._client.take_all())
        self._detour._links.discard(self)

    def _relay(self) -> None:
        before = self._client.state
        try:
            event = receive_event(self._server, self._client)
        except HostError as error:
            if not isinstance(error.__cause__, BlockingIOError):
                self.end(f"server: {error}")
            return
        message = self._message(before, event)
        if message is not None:
            self._member.send([message])

    def _message(self, before: State, event: Joined | Left | None) -> Message[Fd] | None:
        """What the member is told."""
        if isinstance(event, Left):
            wire.close_all(event.descriptors)
            return Message(event.peer)
        if isinstance(event, Joined):
            return Message(event.peer, self._vector(event))
        if before is State.VERSION and self._client.state is State.ID:
            return Message(VERSION)
        if before is State.ID and self._client.state is State.MEMORY:
            assert self._client.own is not None
            return Message(self._client.own)
        if before is State.MEMORY and self._client.state is State.PEERS:
            assert self._client.memory is not None
            return Message(MEMORY, Fd(os.dup(self._client.memory)))
        return None  # half a message

    def _vector(self, event: Joined) -> Fd:
        target = Fd(os.dup(event.descriptor))
        faults = self._detour._faults.get(event.peer)
        own = self._client.own
        if faults is None or own is None or event.peer == own:
            return target
        bell = self._detour._bells.setdefault(
            (event.peer, event.vector), _Bell(faults.fates(own, event.peer, event.vector)))
        proxy = Fd(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        self._proxies.append(proxy)
        self._loop.watch(proxy.number, selectors.EVENT_READ, lambda _: bell.rung(self._loop, proxy, target))
        return proxy
