"""Bytes of a frame: an 8-byte header and a body. No I/O; the table is in docs/idc.md. Depends on idc.errors.

`parse` takes what a peer sent, so it believes nothing: a `ProtocolError` says what is wrong in words.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from idc.errors import MisuseError, ProtocolError

if TYPE_CHECKING:
    from idc.transport.base import Frame

VERSION: Final = 2
HEADER: Final = struct.Struct("<BBHI")
HEADER_BYTES: Final = HEADER.size
_unpack = HEADER.unpack_from
_HELLO: Final = struct.Struct("<HHHHIII")
#: Most bytes of a reason, in UTF-8.
REASON_BYTES: Final = 200
#: Error code of a reply whose handler failed; the body is the reason.
HANDLER_FAILED: Final = 0xFFFF
#: Most slots a side can have: a tag's low half names one.
MAX_SLOTS: Final = 1 << 15
#: Most bytes of parameters, status or a message.
MAX_BODY: Final = 1 << 24


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    MESSAGE = 2
    DONE = 3
    REQUEST = 4
    REPLY = 5
    BYE = 6
    RESOLVE = 7
    RELEASE = 8
    REVOKE = 9
    PULL = 10
    PUSH = 11
    FILLED = 12
    ANSWER = 13


#: What the libraries of both sides ask each other about remote buffers; ANSWER answers each.
ASKS: Final = frozenset({Kind.RESOLVE, Kind.RELEASE, Kind.REVOKE, Kind.PULL, Kind.PUSH, Kind.FILLED})
#: Fewest bytes that a side which takes such requests accepts in one: every one of them fits but for the data.
ASK_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Quotas:
    """What one side accepts of the other, and so also the resources it sets aside for that.

    Attributes:
        requests: transactions that it holds uncompleted, 0 to 32768.
        messages: messages that it holds uncompleted, 0 to 32768.
        parameter_bytes: longest parameters, and longest message.
        status_bytes: longest status of a reply that it gets.
        asks: requests about remote buffers that it holds unanswered, 0 to 32768; the client never sees them.
        ask_bytes: longest of those, and of their answers; 256 at least if there are any.
    """

    requests: int = 16
    messages: int = 16
    parameter_bytes: int = 256
    status_bytes: int = 256
    asks: int = 0
    ask_bytes: int = 0

    def __post_init__(self) -> None:
        for name, most in (("requests", MAX_SLOTS), ("messages", MAX_SLOTS), ("parameter_bytes", MAX_BODY),
                           ("status_bytes", MAX_BODY), ("asks", MAX_SLOTS), ("ask_bytes", MAX_BODY)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise MisuseError(f"quota {name} of {value}: must be 0 to {most}")
        if self.asks and self.ask_bytes < ASK_BYTES:
            raise MisuseError(f"quota ask_bytes of {self.ask_bytes}: must be {ASK_BYTES} at least")

    @property
    def body_bytes(self) -> int:
        """Longest body of any frame that this side accepts."""
        return max(self.parameter_bytes, self.status_bytes, self.ask_bytes, REASON_BYTES, _HELLO.size)


def encode(kind: Kind, tag: int = 0, body: bytes = b"", error: int = 0) -> bytes:
    """One frame."""
    return HEADER.pack(kind, 0, error, tag) + body


def hello(accepts: Quotas) -> bytes:
    """The first frame."""
    return encode(Kind.HELLO, body=_HELLO.pack(VERSION, accepts.requests, accepts.messages, accepts.asks,
                                               accepts.parameter_bytes, accepts.status_bytes, accepts.ask_bytes))


def bye(reason: str) -> bytes:
    """The last frame: why this side ends the connection."""
    return encode(Kind.BYE, body=reason_bytes(reason))


def reason_bytes(reason: str) -> bytes:
    """A reason as it is sent: UTF-8, cut at a character."""
    return reason.encode("utf-8", "replace")[:REASON_BYTES].decode("utf-8", "ignore").encode()


def reason_text(body: bytes) -> str:
    """A reason that a peer sent, fit for a terminal."""
    text = body[:REASON_BYTES].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def parse(frame: Frame) -> tuple[int, int, int, bytes]:
    """(kind, error, tag, body). Raises ProtocolError for a frame shorter than its header or with flags."""
    if type(frame) is tuple:
        header, body = frame
    elif len(frame) < 8:
        raise ProtocolError(f"a frame of {len(frame)} bytes, the header alone has {HEADER_BYTES}")
    else:
        header, body = frame, frame[8:]
    kind, flags, error, tag = _unpack(header)
    if flags:
        raise ProtocolError(f"a frame with flags {flags:#x}, version {VERSION} has none")
    return kind, error, tag, body


def parse_hello(body: bytes) -> Quotas:
    """What the peer accepts. Raises ProtocolError."""
    version = int.from_bytes(body[:2], "little")
    if len(body) >= 2 and version != VERSION:
        raise ProtocolError(f"the peer speaks version {version} of the endpoint protocol, this side {VERSION}")
    if len(body) != _HELLO.size:
        raise ProtocolError(f"a HELLO of {len(body)} bytes instead of {_HELLO.size}")
    _, requests, messages, asks, parameters, status, ask_bytes = _HELLO.unpack(body)
    try:
        return Quotas(requests, messages, parameters, status, asks, ask_bytes)
    except MisuseError as error:
        raise ProtocolError(f"the peer's HELLO: {error}") from error
