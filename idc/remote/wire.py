"""Bodies of the frames about remote buffers. No I/O; the tables are in docs/remote-buffers.md.

What a peer sent is parsed here and believed nowhere: a `ProtocolError` says what is wrong with it. The reference inside
a request is the owner's to check. Depends on idc.endpoint.frames and idc.errors.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from idc.endpoint.frames import REASON_BYTES, Kind, reason_bytes, reason_text
from idc.errors import ProtocolError
from idc.remote.reference import EVERY_ACCESS, REFERENCE_BYTES, Access
from idc.remote.resolution import Lease, OwnerCopy

#: After the reference: access asked for, domains it came through, zero, offset and length within the reference.
_REQUEST: Final = struct.Struct("<BBHIQQ")
_LEASE_ID: Final = struct.Struct("<Q")
#: Kind of answer, access, domains it came through, zero.
_RESOLVED: Final = struct.Struct("<BBBBI")
_LEASE: Final = struct.Struct("<Q16sQQ64s")
#: Copies of each byte so far, zero, bytes moved.
_MOVED: Final = struct.Struct("<BBHIQ")

REQUEST_BYTES: Final = REFERENCE_BYTES + _REQUEST.size
MOVED_BYTES: Final = _MOVED.size
#: Most domains that a request goes through: a reference that is forwarded in a circle comes to an end.
MOST_HOPS: Final = 8

_IS_LEASE, _IS_OWNER_COPY = 1, 2


@dataclass(frozen=True, slots=True)
class Request:
    """RESOLVE, PULL, PUSH or FILLED.

    Attributes:
        reference: its bytes, unchecked.
        want: access that is asked for.
        hops: domains it came through.
        offset: within the reference, bytes.
        length: bytes; of RESOLVE 0.
        data: what to write; empty but in PUSH.
    """

    reference: bytes
    want: Access
    hops: int
    offset: int
    length: int
    data: memoryview


def request(reference: bytes, want: Access, hops: int = 0, offset: int = 0, length: int = 0,
            data: bytes | bytearray | memoryview = b"") -> bytes:
    """Body of RESOLVE, PULL, PUSH or FILLED."""
    return b"".join((reference, _REQUEST.pack(want, hops, 0, 0, offset, length), data))


def parse_request(kind: Kind, body: bytes) -> Request:
    """What a peer asks. Raises ProtocolError."""
    if len(body) < REQUEST_BYTES:
        raise ProtocolError(f"a {kind.name} of {len(body)} bytes, its head alone has {REQUEST_BYTES}")
    want, hops, zero, more_zero, offset, length = _REQUEST.unpack_from(body, REFERENCE_BYTES)
    data = memoryview(body)[REQUEST_BYTES:]
    wanted = {Kind.PULL: Access.READ, Kind.PUSH: Access.WRITE, Kind.FILLED: Access.WRITE}.get(kind)
    if zero or more_zero or not 0 < want <= EVERY_ACCESS or (wanted is not None and want != wanted):
        raise ProtocolError(f"a {kind.name} with access {want} and {zero}, {more_zero} where zero is due")
    if hops > MOST_HOPS:
        raise ProtocolError(f"a {kind.name} that came through {hops} domains, {MOST_HOPS} are the limit")
    if len(data) != (length if kind == Kind.PUSH else 0):
        raise ProtocolError(f"a {kind.name} for {length} bytes with {len(data)} bytes of data")
    if kind == Kind.RESOLVE and (offset or length):
        raise ProtocolError(f"a RESOLVE for {length} bytes at {offset}, it has neither")
    if kind in (Kind.PULL, Kind.PUSH) and not length:
        raise ProtocolError(f"a {kind.name} for no bytes")
    return Request(body[:REFERENCE_BYTES], Access(want), hops, offset, length, data)


def lease_id(lease: int) -> bytes:
    """Body of RELEASE and REVOKE."""
    return _LEASE_ID.pack(lease)


def parse_lease_id(kind: Kind, body: bytes) -> int:
    """Which lease. Raises ProtocolError."""
    if len(body) != _LEASE_ID.size:
        raise ProtocolError(f"a {kind.name} of {len(body)} bytes instead of {_LEASE_ID.size}")
    (lease,) = _LEASE_ID.unpack(body)
    return int(lease)


def resolution(answer: Lease | OwnerCopy) -> bytes:
    """Body of the ANSWER to RESOLVE."""
    if isinstance(answer, Lease):
        return (_RESOLVED.pack(_IS_LEASE, answer.access, answer.hops, 0, 0)
                + _LEASE.pack(answer.lease, answer.region.bytes, answer.offset, answer.length, answer.name.encode()))
    region = answer.region.bytes if answer.region is not None else bytes(16)
    return _RESOLVED.pack(_IS_OWNER_COPY, 0, answer.hops, 0, 0) + region + reason_bytes(answer.reason)


def parse_resolution(body: bytes) -> Lease | OwnerCopy:
    """What the owner, or who forwards, answered. Raises ProtocolError."""
    if len(body) < _RESOLVED.size:
        raise ProtocolError(f"an answer to RESOLVE of {len(body)} bytes, its head alone has {_RESOLVED.size}")
    kind, access, hops, zero, more_zero = _RESOLVED.unpack_from(body)
    rest = body[_RESOLVED.size:]
    if zero or more_zero or hops > MOST_HOPS + 1:
        raise ProtocolError(f"an answer to RESOLVE with {zero}, {more_zero} where zero is due, through {hops} domains")
    if kind == _IS_OWNER_COPY and not access and 16 <= len(rest) <= 16 + REASON_BYTES:
        return OwnerCopy(reason_text(rest[16:]), UUID(bytes=rest[:16]) if any(rest[:16]) else None, hops)
    if kind != _IS_LEASE or not 0 < access <= EVERY_ACCESS or len(rest) != _LEASE.size:
        raise ProtocolError(f"an answer to RESOLVE of kind {kind}, access {access}, with {len(rest)} bytes")
    lease, region, offset, length, name = _LEASE.unpack(rest)
    return Lease(lease, UUID(bytes=region), reason_text(name.rstrip(b"\0")), offset, length, Access(access), hops)


def moved(copies: int, length: int, data: bytes | bytearray | memoryview = b"") -> bytes:
    """Body of the ANSWER to PULL, with the bytes, and to PUSH, without."""
    return b"".join((_MOVED.pack(min(copies, 255), 0, 0, 0, length), data))


def parse_moved(kind: Kind, body: bytes, most: int) -> tuple[int, int, memoryview]:
    """(copies of each byte so far, bytes moved, the bytes if it was a PULL).

    A peer may move fewer than asked, but not none: then it refuses. Raises ProtocolError.
    """
    if len(body) < MOVED_BYTES:
        raise ProtocolError(f"an answer to {kind.name} of {len(body)} bytes, its head alone has {MOVED_BYTES}")
    copies, zero, more_zero, still_zero, length = _MOVED.unpack_from(body)
    data = memoryview(body)[MOVED_BYTES:]
    if zero or more_zero or still_zero:
        raise ProtocolError(f"an answer to {kind.name} with something where zero is due")
    if not 0 < length <= most or len(data) != (length if kind == Kind.PULL else 0):
        raise ProtocolError(f"an answer to {kind.name} that moved {length} of {most} bytes, with {len(data)} of data")
    return copies, length, data
