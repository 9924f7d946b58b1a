"""Bytes of a trace event: a 32-byte header and up to 4 KiB of payload. No I/O; the table is in docs/trace.md.

`split` takes what another domain wrote, so it believes nothing. Depends on idc.errors.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from idc.errors import MisuseError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: time, flow, sequence, lane, type, kind, payload bytes, name bytes, detail, value.
HEADER: Final = struct.Struct("<QQIHBBHBBI")
HEADER_BYTES: Final = HEADER.size
#: Most bytes of a payload, its name included.
PAYLOAD_BYTES: Final = 4096
#: Most bytes of a name, in UTF-8.
NAME_BYTES: Final = 255
EVENT_BYTES: Final = HEADER_BYTES + PAYLOAD_BYTES
#: What a PING asks and its answer says: the number of the ping, when it came, when the answer left; ns.
PONG: Final = struct.Struct("<QQQ")
#: Data of a SYNC: sent and answer received by the writer's clock, ping received and answer sent by the reader's; ns.
SYNC: Final = struct.Struct("<QQQQ")
#: Data of a CONNECT: what the flows of this end's submissions are derived from, and of the peer's.
FLOWS: Final = struct.Struct("<QQ")
#: Data of a counter.
COUNTER: Final = struct.Struct("<q")
_REST: Final = struct.Struct("<BBHB")
_REST_AT: Final = 22


class Type(enum.IntEnum):
    """What an event is to a timeline."""

    BEGIN = 1
    END = 2
    INSTANT = 3
    COUNTER = 4


class Kind(enum.IntEnum):
    """What happened. USER is the domain's own business; the others are the library's."""

    USER = 0
    LANE = 1
    DROPPED = 2
    PING = 3
    SYNC = 4
    STATE = 5
    CONNECT = 6
    DISCONNECT = 7
    DOORBELL = 8
    SUBMIT = 9
    HANDLE = 10
    ANSWER = 11
    COMPLETE = 12
    MOMENTS = 13


_LAST_KIND: Final = max(Kind)


class TraceEvent(NamedTuple):
    """One event, checked.

    Attributes:
        time: of the domain's monotonic clock, ns.
        flow: joins events of several domains; 0 is none.
        sequence: counts what the writer was given, modulo 2^32; a gap is what it dropped.
        lane: of the writer's: an endpoint, say; 0 is the domain itself.
        type: see there.
        kind: see there.
        name: what happened, in words; empty for events of the library that need none.
        data: the rest of the payload.
        detail: of SUBMIT to COMPLETE: the frame's kind; of STATE, CONNECT, DISCONNECT: 0.
        value: of SUBMIT to COMPLETE: the tag; of DROPPED: how many; of DOORBELL: how many since the last.
    """

    time: int
    flow: int
    sequence: int
    lane: int
    type: int
    kind: int
    name: bytes
    data: bytes
    detail: int
    value: int

    @property
    def text(self) -> str:
        """The name, fit for a terminal."""
        return printable(self.name)


def printable(text: bytes) -> str:
    """Words that another domain wrote, fit for a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text.decode("utf-8", "replace"))


def encode(event: TraceEvent) -> bytes:
    """Its bytes. Raises MisuseError for a name or payload that is too long."""
    check_lengths(len(event.name), len(event.data))
    return HEADER.pack(event.time, event.flow, event.sequence, event.lane, event.type, event.kind,
                       len(event.name) + len(event.data), len(event.name), event.detail, event.value
                       ) + event.name + event.data


def check_lengths(name: int, data: int) -> None:
    """Raise MisuseError for lengths that no event can have."""
    if name > NAME_BYTES:
        raise MisuseError(f"an event's name of {name} bytes: {NAME_BYTES} is the limit")
    if name + data > PAYLOAD_BYTES:
        raise MisuseError(f"an event's payload of {name + data} bytes, its name included: {PAYLOAD_BYTES} is the limit")


def whole(data: bytes | bytearray | memoryview) -> tuple[int, list[int]]:
    """Check what is there of a stream of events.

    Returns:
        How many bytes the whole events at its start take, and where in it a PING begins.

    Raises:
        ProtocolError: what stands there is no event.
    """
    at, there, pings = 0, len(data), []
    rest = _REST.unpack_from
    while there - at >= HEADER_BYTES:
        type_, kind, length, name = rest(data, at + _REST_AT)
        if not 1 <= type_ <= 4 or kind > _LAST_KIND or length > PAYLOAD_BYTES or name > length:
            raise ProtocolError(f"no trace event: type {type_}, kind {kind}, {length} bytes of payload, {name} of name")
        if there - at - HEADER_BYTES < length:
            break
        if kind == Kind.PING:
            pings.append(at)
        at += HEADER_BYTES + length
    return at, pings


def split(data: bytes) -> Iterator[TraceEvent]:
    """The events of a run of whole ones. Raises ProtocolError at the first thing that is none."""
    end, _ = whole(data)
    if end != len(data):
        raise ProtocolError(f"{len(data) - end} bytes after the last whole event")
    at = 0
    while at < end:
        time, flow, sequence, lane, type_, kind, length, name, detail, value = HEADER.unpack_from(data, at)
        at += HEADER_BYTES
        yield TraceEvent(time, flow, sequence, lane, type_, kind, data[at:at + name], data[at + name:at + length],
                         detail, value)
        at += length
