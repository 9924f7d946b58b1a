"""Requests of a trace device: its front end's streams of events, for its back end to write. No I/O.

    op 1 OPEN    u64 stream                     answer: u64 bytes of it that are written
    op 2 WRITE   u64 stream, u64 position, events   answer: none
    op 3 CLOSE   u64 stream, reason (UTF-8)     answer: none
    op 4 PING                                   answer: u64 when it came, u64 when the answer left, ns

each the parameters of a transaction, all little-endian. A stream is what one program logs; its number is a random one.
A WRITE has whole events, and its position, in bytes of its stream: so one that is repeated after a lost connection is
written once. Depends on idc.errors and idc.trace.events.
"""

from __future__ import annotations

import enum
import struct
from typing import Final, NamedTuple

from idc.errors import ProtocolError
from idc.trace import events

#: Most bytes of events in one WRITE.
PIECE: Final = 32 << 10
_HEAD: Final = struct.Struct("<BQ")
_AT: Final = struct.Struct("<Q")
TIMES: Final = struct.Struct("<QQ")
PARAMETER_BYTES: Final = _HEAD.size + _AT.size + PIECE
#: Answers are short; the texts of errors are cut to this.
STATUS_BYTES: Final = 256


class Op(enum.IntEnum):
    """What is asked."""

    OPEN = 1
    WRITE = 2
    CLOSE = 3
    PING = 4


class Fault(enum.IntEnum):
    """Why it is refused."""

    BROKE_RULES = 1
    NO_ROOM = 2


class Ask(NamedTuple):
    """One request."""

    op: Op
    stream: int = 0
    at: int = 0
    data: bytes = b""

    def pack(self) -> bytes:
        """As parameters."""
        at = _AT.pack(self.at) if self.op is Op.WRITE else b""
        return _HEAD.pack(self.op, self.stream) + at + self.data


def parse(parameters: bytes) -> Ask:
    """What a stranger sent. Raises ProtocolError."""
    try:
        code, stream = _HEAD.unpack_from(parameters)
        op, rest = Op(code), parameters[_HEAD.size:]
        if op is not Op.WRITE:
            return Ask(op, stream, data=rest[:STATUS_BYTES])
        (at,) = _AT.unpack_from(rest)
    except (struct.error, ValueError) as error:
        raise ProtocolError(f"{len(parameters)} bytes that are no request of a trace device: {error}") from None
    data = rest[_AT.size:]
    end, _ = events.whole(data)
    if end != len(data) or not data:
        raise ProtocolError(f"a WRITE of {len(data)} bytes, {end} of them in whole events")
    return Ask(op, stream, at, data)


def written(status: bytes) -> int:
    """Answer to OPEN. Raises ProtocolError."""
    if len(status) != _AT.size:
        raise ProtocolError(f"{len(status)} bytes that do not say how much is written")
    return int(_AT.unpack(status)[0])


def pack_written(length: int) -> bytes:
    """The same."""
    return _AT.pack(length)
