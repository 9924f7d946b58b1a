"""What the region server knows, as the broker needs it: regions as they were made, and who has attached how often.

The region server's word, never the header page's: that can be written by every rw member. While the server is away,
what was known last stands, for nothing can change without it. Depends on host.wire, host.errors and idc.layout.
"""

from __future__ import annotations

import base64
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from host import wire
from host.errors import HostError, ServerError
from idc.layout import LayoutError, RegionHeader, parse_header

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Seconds for one request. The server never waits for anybody, and has just given a sign of life when it is asked.
CALL_TIMEOUT: Final = 2.0


@dataclass(frozen=True, slots=True)
class Known:
    """One region: its header as it was made, and where each rw member connects."""

    header: RegionHeader
    sockets: Mapping[str, Path]


class Directory:
    """A copy of the server's state, refreshed when it says that something changed.

    Args:
        path: the server's control socket.

    Attributes:
        regions: by uuid.
        incarnations: how often a member has attached, by region's name and member's.
    """

    def __init__(self, path: Path) -> None:
        self.regions: dict[UUID, Known] = {}
        self.incarnations: dict[str, dict[str, int]] = {}
        self._path = path
        self._watch: socket.socket | None = None
        self._calls: socket.socket | None = None

    def fileno(self) -> int:
        """Readable when `notice` has something to take; -1 while there is no connection."""
        return -1 if self._watch is None else self._watch.fileno()

    def connect(self) -> None:
        """Ask the server for notices; its answer is the first one. Never waits: a server may be stopped.

        Raises ServerError when there is none; what was known stands then.
        """
        self.close()
        watch = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        watch.setblocking(False)
        try:
            watch.connect(str(self._path))
            wire.send_message(watch, {"op": "watch"})
        except OSError as error:
            watch.close()
            raise ServerError(f"no region server at {self._path}: {error.strerror}") from error
        self._watch = watch

    def notice(self) -> bool:
        """Take the server's notices; whether there was one, so that `refresh` is due. Never waits.

        The server sends one before a member that has attached can do anything, so without one what is known is true.
        Raises ServerError when the server has gone.
        """
        if self._watch is None:
            return False
        seen = False
        try:
            while self._watch.recv(4096):
                seen = True
        except BlockingIOError:
            return seen
        except OSError as error:
            self.close()
            raise ServerError(f"the region server is gone: {error.strerror}") from error
        self.close()
        raise ServerError("the region server is gone")

    def refresh(self) -> None:
        """Ask for everything again. Raises ServerError; what was known stands then."""
        reply, _ = self._call({"op": "list"})
        uuids = {name: UUID(hex=value) for name, value in reply["uuids"].items()}
        regions = {}
        for name, uuid in uuids.items():
            regions[uuid] = self.regions.get(uuid) or self._describe(name)
        self.regions = {known.header.uuid: known for known in regions.values()}
        self.incarnations = {name: {member: int(state["incarnation"]) for member, state in members.items()}
                             for name, members in reply["regions"].items()}

    def open(self, region: UUID) -> int:
        """A new descriptor of a region's memory. Raises ServerError."""
        known = self.regions.get(region)
        if known is None:
            raise ServerError(f"there is no region {region}")
        _, fds = self._call({"op": "open", "region": known.header.name, "uuid": region.hex})
        if len(fds) != 1:
            wire.close_all(fds)
            raise ServerError(f"the region server gave {len(fds)} descriptors for region {known.header.name}")
        return fds[0]

    def close(self) -> None:
        """End the connection; what is known stays."""
        for sock in (self._watch, self._calls):
            if sock is not None:
                sock.close()
        self._watch = self._calls = None

    def _describe(self, name: str) -> Known:
        reply, _ = self._call({"op": "describe", "region": name})
        try:
            header = parse_header(base64.b64decode(reply["page"]))
        except LayoutError as error:
            raise ServerError(f"the region server's header of {name}: {error}") from error
        return Known(header, {member: Path(path) for member, path in reply["sockets"].items()})

    def _call(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        try:
            if self._calls is None:
                self._calls = wire.connect(self._path, CALL_TIMEOUT)
            wire.send_message(self._calls, request)
            answer = wire.receive_message(self._calls)
            if answer is None:
                raise ConnectionResetError("it closed the connection")
        except (OSError, HostError) as error:
            if self._calls is not None:
                self._calls.close()
                self._calls = None
            raise ServerError(f"the region server does not answer {request['op']}: {error}") from error
        reply, fds = answer
        if not reply.get("ok"):
            wire.close_all(fds)
            raise ServerError(f"the region server refuses {request['op']}: {reply.get('error')}")
        return reply, fds
