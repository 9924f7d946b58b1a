"""What broker and registry have in common: one loop over control links and the region server's notices, and a process
around it that runs in the foreground.

Depends on host.broker.directory, host.controls, host.errors and host.wire.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic

from host import wire
from host.broker.directory import Directory
from host.controls import L, Links
from host.errors import HostError, ServerError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Sequence

    from idc.endpoint import Endpoint

#: Longest sleep, seconds; nothing depends on it.
NAP: Final = 1.0
#: Seconds for the region server to answer at the start.
START_TIMEOUT: Final = 5.0
#: Seconds until a region server that is away is looked for again.
SEARCH: Final = 0.2


class Serving(ABC, Generic[L]):
    """A server that has a link to every domain with a control region, in one thread.

    Args:
        server: control socket of the region server.
        links: to the domains.
        log: of the server.

    Attributes:
        directory: what the region server said last.
        links: to the domains.
    """

    def __init__(self, server: Path, links: Links[L], log: logging.Logger) -> None:
        self.directory = Directory(server)
        self.links = links
        self._log = log
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
            busy |= self._work(now)
            if self._wait(lifeline, 0.0 if busy else self._nap()):
                return

    def close(self) -> None:
        """Leave everything."""
        self.links.sync({}, 0.0)
        self.directory.close()

    # -- what a server adds

    @abstractmethod
    def _work(self, now: float) -> bool:
        """What is due beside the links, without waiting. Whether anything was."""

    @abstractmethod
    def _files(self) -> Sequence[int]:
        """Descriptors of its own to sleep on."""

    @abstractmethod
    def _ready(self, ready: Sequence[int]) -> None:
        """Some descriptors can be read, these among them."""

    def _endpoints(self) -> Iterable[Endpoint]:
        """All that are driven."""
        return [link.endpoint for link in self.links.by_domain.values()]

    def _dues(self) -> Sequence[float | None]:
        """When there is something to do though nothing happens."""
        return ()

    def _changed(self) -> None:
        """The directory has changed."""

    def _sync(self, now: float) -> None:
        """Join and leave control regions."""
        self._sync_at = self.links.sync(self.directory.regions, now)

    # -- within

    def _catch_up(self) -> None:
        """Learn what has changed, if anything has. Raises ServerError."""
        if not self.directory.notice():
            return
        try:
            self.directory.refresh()
        except ServerError:
            self.directory.close()  # the notice is used up: the next connection begins with one
            raise
        self._changed()
        self._sync_at = 0.0

    def _follow(self, now: float) -> None:
        """Keep up with the region server, and join and leave control regions."""
        try:
            if self.directory.fileno() < 0 and now >= self._search_at:
                self._search_at = now + SEARCH
                self.directory.connect()
            self._catch_up()
        except ServerError as error:
            self._log.info("%s", error)
            self.directory.close()
        if self._sync_at is not None and now >= self._sync_at:
            self._sync(now)

    def _nap(self) -> float:
        """Seconds to sleep at most; 0 if a link has something to do."""
        naps = [NAP]
        for endpoint in self._endpoints():
            if not endpoint.arm():
                return 0.0
            naps.append(NAP if endpoint.patience is None else endpoint.patience)
        now = time.monotonic()
        search = self._search_at if self.directory.fileno() < 0 else None
        naps += [max(0.0, due - now) for due in (self._sync_at, search, *self._dues()) if due is not None]
        return min(naps)

    def _wait(self, lifeline: int | None, nap: float) -> bool:
        """Sleep until something is to be done. Whether the lifeline ended."""
        poller = select.poll()
        fds = [*self._files(), *(fd for fd in (lifeline, self.directory.fileno()) if fd is not None and fd >= 0)]
        if nap:
            fds += [endpoint.fileno() for endpoint in self._endpoints()]
        for fd in fds:
            poller.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poller.poll(nap * 1000)]
        self._ready(ready)
        return lifeline in ready


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those that every server has as a process."""
    parser.add_argument("--server", type=Path, required=True, metavar="SOCKET", help="control of the region server")
    parser.add_argument("--ready", type=int, metavar="FD", help="write a newline here once requests are served")
    parser.add_argument("--lifeline", type=int, metavar="FD", help="end when this pipe does")


def run(name: str, args: argparse.Namespace, make: Callable[[], Serving[L]]) -> None:
    """Make a server and run it until the lifeline ends, or SIGTERM comes. Logs to standard error.

    Raises SystemExit: with one line if it cannot be made or cannot go on.
    """
    logging.basicConfig(level=logging.INFO, format=f"{name}: %(message)s", stream=sys.stderr)
    signal.signal(signal.SIGTERM, _stop)
    wire.raise_descriptor_limit()
    try:
        server = make()
    except HostError as error:
        sys.exit(f"{name}: {error}")
    try:
        server.start()
        if args.ready is not None:
            os.write(args.ready, b"\n")
            os.close(args.ready)
        server.run(args.lifeline)
    except HostError as error:
        sys.exit(f"{name}: {error}")
    finally:
        server.close()


def _stop(*_: object) -> None:
    raise SystemExit(0)
