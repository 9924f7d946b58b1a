"""The registry's loop: links, the region server's notices, host processes that connect, the disk.

Everything but what `host.registry.store` keeps can be lost: after kill -9 the next registry joins the control regions
again, and each domain's side sets its watches again. Depends on host.broker.directory, host.controls, host.registry.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from host import wire
from host.broker.directory import Directory
from host.controls import RETRY, Links, control_regions, open_link
from host.errors import ServerError
from host.registry import CHANNEL, MEMBER
from host.registry.desk import Desk
from host.registry.links import SeatLink
from host.registry.store import Store, Writer
from idc.registry.frames import HOST
from idc.transport.unix import AcceptedPort

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from host.broker.directory import Known
    from host.registry.tree import Limits

#: Longest sleep, seconds; nothing depends on it.
NAP: Final = 1.0
#: Seconds for the region server to answer at the start.
START_TIMEOUT: Final = 5.0
#: Seconds until a region server that is away is looked for again.
SEARCH: Final = 0.2
#: Seconds in which a domain has to come back after the registry started, before its ephemeral nodes vanish.
GRACE: Final = 10.0
#: Host processes that are connected at a time; more wait until one ends.
HOST_LINKS: Final = 64

log = logging.getLogger("host.registry")


class Service:
    """All of the registry, in one thread and one that writes.

    Args:
        server: control socket of the region server.
        path: where host processes connect; who may is decided by the socket's permissions, 0600.
        directory: what is kept there.
        limits: of each domain.
        grace: see GRACE.

    Raises:
        StoreError: the directory cannot be used.
        SocketPathError: `path` cannot be bound.
    """

    def __init__(self, server: Path, path: Path, directory: Path, limits: Limits | None = None,
                 grace: float = GRACE) -> None:
        store = Store(directory)
        try:
            self._listener = wire.listen(path, socket.SOCK_STREAM)
        except BaseException:
            store.close()
            raise
        self.desk = Desk(store.state, limits)
        self.directory = Directory(server)
        self.links: Links[SeatLink] = Links(self._join, log)
        self._path = path
        self._writer = Writer(store)
        self._host: list[SeatLink] = []
        self._grace = grace
        self._orphans_at = time.monotonic() + grace
        self._search_at = 0.0
        self._sync_at: float | None = 0.0

    def start(self) -> None:
        """Find the region server and join the control regions that there are. Raises ServerError."""
        self.directory.connect()
        poller = select.poll()
        poller.register(self.directory.fileno(), select.POLLIN)
        if not poller.poll(START_TIMEOUT * 1000):
            raise ServerError(f"the region server does not answer within {START_TIMEOUT:g} s")
        self._catch_up()
        self._sync(time.monotonic())

    def run(self, lifeline: int | None) -> None:
        """Until the lifeline ends, or an exception."""
        while True:
            now = time.monotonic()
            self._follow(now)
            busy = self.links.pump(now)
            busy |= self._pump_host()
            busy |= self.desk.work()
            busy |= self._write()
            busy |= self.desk.tell()
            if self._wait(lifeline, 0.0 if busy else self._nap()):
                return

    def close(self) -> None:
        """Leave everything; what is being written is finished."""
        self._path.unlink(missing_ok=True)
        self._listener.close()
        for link in self._host:
            link.close()
        self.links.sync({}, 0.0)
        self.directory.close()
        self._writer.close()

    # -- within

    def _join(self, known: Known, name: str) -> SeatLink:
        return SeatLink(open_link(known, MEMBER, CHANNEL), self.desk, name)

    def _catch_up(self) -> None:
        """Learn what has changed, if anything has. Raises ServerError."""
        if not self.directory.notice():
            return
        try:
            self.directory.refresh()
        except ServerError:
            self.directory.close()  # the notice is used up: the next connection begins with one
            raise
        self._sync_at = 0.0

    def _sync(self, now: float) -> None:
        """A home for each domain that has a control region, and a link to it; none for those that have none now."""
        there = {name: known.header.uuid.bytes for name, known in control_regions(self.directory.regions)}
        for name in self.desk.known - there.keys():
            self.desk.dismiss(name)
        for name, uuid in there.items():
            self.desk.admit(name, uuid)
        self._sync_at = self.links.sync(self.directory.regions, now)

    def _follow(self, now: float) -> None:
        """Keep up with the region server, and join and leave control regions."""
        try:
            if self.directory.fileno() < 0 and now >= self._search_at:
                self._search_at = now + SEARCH
                self.directory.connect()
            self._catch_up()
        except ServerError as error:
            log.info("%s", error)
            self.directory.close()
        if self._sync_at is not None and now >= self._sync_at:
            self._sync(now)
        if self.desk.orphans and now >= self._orphans_at:
            self._orphans_at = now + self._grace
            self.desk.remove_orphans()

    def _pump_host(self) -> bool:
        busy = False
        for link in tuple(self._host):
            try:
                busy |= link.pump()
                over = link.over
            except Exception:
                log.exception("a host process: its link failed")
                over = True
            if over:
                self._host.remove(link)
                link.close()
                busy = True
        return busy

    def _write(self) -> bool:
        """Deal with what has been written, and begin with what is to be. Whether anything was over."""
        done = self._writer.take()
        if done is not None:
            batch, why = done
            if why:
                self.desk.failed(batch, why)
                self._sync_at = time.monotonic() + RETRY  # homes that were to be made
            else:
                self.desk.written(batch)
        batch_next = self.desk.batch()
        if batch_next is not None:
            self._writer.start(batch_next)
        return done is not None

    def _all(self) -> Sequence[SeatLink]:
        return [*self.links.by_domain.values(), *self._host]

    def _nap(self) -> float:
        """Seconds to sleep at most; 0 if a link has something to do."""
        naps = [NAP]
        for link in self._all():
            if not link.endpoint.arm():
                return 0.0
            naps.append(NAP if link.endpoint.patience is None else link.endpoint.patience)
        now = time.monotonic()
        search = self._search_at if self.directory.fileno() < 0 else None
        orphans = self._orphans_at if self.desk.orphans else None
        dues = [self._sync_at, search, orphans]
        naps += [max(0.0, due - now) for due in dues if due is not None]
        return min(naps)

    def _wait(self, lifeline: int | None, nap: float) -> bool:
        """Sleep until something is to be done. Whether the lifeline ended."""
        poller = select.poll()
        fds = [self._writer.fileno()]
        if len(self._host) < HOST_LINKS:
            fds.append(self._listener.fileno())
        fds += [fd for fd in (lifeline, self.directory.fileno()) if fd is not None and fd >= 0]
        if nap:
            fds += [link.endpoint.fileno() for link in self._all()]
        for fd in fds:
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poller.poll(nap * 1000)]
        if self._listener.fileno() in ready:
            self._accept()
        return lifeline in ready

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            sock, _ = self._listener.accept()
            if not wire.same_user(sock):
                sock.close()
                return
            self._host.append(SeatLink(AcceptedPort(sock), self.desk, HOST))
