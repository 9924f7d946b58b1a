"""Bytes of what goes over a control link, as parameters, status and messages of its endpoint. No I/O.

Little-endian; lengths and offsets in bytes. A first byte says which:

    1 IDENTITY  message, broker to domain, first of all: u8 1, u8 length of the name, 6 zero, 16s domain uuid,
                u64 incarnation, name (ASCII)
    2 RESOLVE   transaction, broker to owner: u8 2, u8 access wanted, 6 zero, reference.
                Status: u8 1 lease or 2 owner copy, u8 access, 6 zero, u64 lease, 16s region uuid, u64 offset in the
                region, u64 length.
    3 COPY      transaction, domain to broker: u8 3, u8 which of the two comes with a lease of the asker's own (0 none,
                1 source, 2 target), 6 zero, u64 offset in the source, u64 offset in the target, u64 length, reference
                of the source, of the target, and that lease as in RESOLVE's status. Status: u64 bytes copied.
    4 REVOKE    transaction, owner to broker: u8 4, 7 zero, u64 lease. Answered when nothing uses it any more.
    5 RELEASE   message, broker to owner: u8 5, 7 zero, u64 lease. The broker has given it back.

The error code of an answer is a `Refusal`, and the status is the reason in UTF-8. Everything that is parsed here was
written by someone who may mean ill: `ControlError` says what is wrong with it. Depends on idc.endpoint.frames and
idc.remote.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from idc.endpoint.frames import Quotas, reason_bytes, reason_text
from idc.remote.reference import EVERY_ACCESS, REFERENCE_BYTES, Access
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused

_IDENTITY: Final = struct.Struct("<BB6x16sQ")
_RESOLVE: Final = struct.Struct("<BB6x")
_ANSWER: Final = struct.Struct("<BB6xQ16sQQ")
_COPY: Final = struct.Struct("<BB6xQQQ")
_LEASE: Final = struct.Struct("<B7xQ")
_COPIED: Final = struct.Struct("<Q")
_LEASED, _OWNER_COPY = 1, 2
_SOURCE, _TARGET = 1, 2

#: What a domain accepts of its broker over the control link, and a broker of a domain.
DOMAIN_ACCEPTS: Final = Quotas(requests=64, messages=64, parameter_bytes=256, status_bytes=256)
BROKER_ACCEPTS: Final = Quotas(requests=32, messages=0, parameter_bytes=256, status_bytes=256)


class Op(enum.IntEnum):
    """First byte of parameters and messages."""

    IDENTITY = 1
    RESOLVE = 2
    COPY = 3
    REVOKE = 4
    RELEASE = 5


class ControlError(ValueError):
    """Bytes that are none of the above; the text says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a domain is, as its broker stamps it.

    Attributes:
        domain: uuid of the domain for all its life.
        incarnation: raised each time it attaches to its control region again.
        name: as the host calls it.
    """

    domain: UUID
    incarnation: int
    name: str


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """COPY.

    Attributes:
        source, target: references.
        source_offset, target_offset: from where each begins.
        length: bytes.
        source_lease, target_lease: of the asker on its own buffer, one at most: nobody has to be asked about that.
    """

    source: bytes
    target: bytes
    source_offset: int
    target_offset: int
    length: int
    source_lease: Lease | None = None
    target_lease: Lease | None = None


def identity(who: Identity) -> bytes:
    """IDENTITY."""
    name = who.name.encode("ascii")
    return _IDENTITY.pack(Op.IDENTITY, len(name), who.domain.bytes, who.incarnation) + name


def resolve(reference: bytes, access: Access) -> bytes:
    """RESOLVE."""
    return _RESOLVE.pack(Op.RESOLVE, access) + reference


def copy(request: CopyRequest) -> bytes:
    """COPY. Raises struct.error for a number that is no u64."""
    lease = request.source_lease or request.target_lease
    which = 0 if lease is None else _SOURCE if request.source_lease else _TARGET
    return (_COPY.pack(Op.COPY, which, request.source_offset, request.target_offset, request.length)
            + request.source + request.target + (b"" if lease is None else answer(lease)))


def revoke(lease: int) -> bytes:
    """REVOKE."""
    return _LEASE.pack(Op.REVOKE, lease)


def release(lease: int) -> bytes:
    """RELEASE."""
    return _LEASE.pack(Op.RELEASE, lease)


def copied(count: int) -> bytes:
    """Status of COPY."""
    return _COPIED.pack(count)


def answer(given: Lease | OwnerCopy) -> bytes:
    """Status of RESOLVE."""
    if isinstance(given, OwnerCopy):
        return _ANSWER.pack(_OWNER_COPY, 0, 0, bytes(16), 0, 0)
    return _ANSWER.pack(_LEASED, given.access, given.lease, given.region.bytes, given.offset, given.length)


def reason(text: str) -> bytes:
    """Status of a refusal."""
    return reason_bytes(text)


def op_of(body: bytes) -> int:
    """The first byte; 0 of nothing."""
    return body[0] if body else 0


def parse_identity(body: bytes) -> Identity:
    """Raises ControlError."""
    _, length, domain, incarnation = _head(_IDENTITY, body, "IDENTITY")
    name = body[_IDENTITY.size:]
    if len(name) != length or not name.isascii():
        raise ControlError(f"IDENTITY with a name of {len(name)} bytes instead of {length} of ASCII")
    return Identity(UUID(bytes=domain), incarnation, name.decode("ascii"))


def parse_resolve(body: bytes) -> tuple[bytes, Access]:
    """(reference, access wanted). Raises ControlError."""
    _, access = _head(_RESOLVE, body, "RESOLVE")
    if len(body) != _RESOLVE.size + REFERENCE_BYTES:
        raise ControlError(f"RESOLVE of {len(body)} bytes instead of {_RESOLVE.size + REFERENCE_BYTES}")
    if not 0 < access <= EVERY_ACCESS:
        raise ControlError(f"RESOLVE wants access {access}")
    return body[_RESOLVE.size:], Access(access)


def parse_copy(body: bytes) -> CopyRequest:
    """Raises ControlError."""
    _, which, source_offset, target_offset, length = _head(_COPY, body, "COPY")
    middle, end = _COPY.size + REFERENCE_BYTES, _COPY.size + 2 * REFERENCE_BYTES
    if which > _TARGET or len(body) != end + (_ANSWER.size if which else 0):
        raise ControlError(f"COPY of {len(body)} bytes with {which} for the side that comes with a lease")
    lease = parse_answer(0, body[end:]) if which else None
    if lease is not None and not isinstance(lease, Lease):
        raise ControlError("COPY with something else where a lease is due")
    return CopyRequest(body[_COPY.size:middle], body[middle:end], source_offset, target_offset, length,
                       lease if which == _SOURCE else None, lease if which == _TARGET else None)


def parse_lease(body: bytes) -> int:
    """Of REVOKE and RELEASE: the lease. Raises ControlError."""
    if len(body) != _LEASE.size:
        raise ControlError(f"{len(body)} bytes instead of {_LEASE.size} to name a lease")
    return int(_LEASE.unpack(body)[1])


def parse_copied(status: bytes) -> int:
    """Of COPY's answer: bytes copied. Raises ControlError."""
    if len(status) != _COPIED.size:
        raise ControlError(f"a status of {len(status)} bytes instead of {_COPIED.size}")
    return int(_COPIED.unpack(status)[0])


def parse_answer(error: int, status: bytes) -> Lease | OwnerCopy | Refused:
    """Of RESOLVE's answer. The region's name is not in it. Raises ControlError."""
    if error:
        known = error in Refusal.__members__.values()
        return Refused(Refusal(error) if known else Refusal.FAILED, reason_text(status) or f"refused with code {error}")
    if len(status) != _ANSWER.size:
        raise ControlError(f"an answer of {len(status)} bytes instead of {_ANSWER.size}")
    kind, access, lease, region, offset, length = _ANSWER.unpack(status)
    if kind == _OWNER_COPY:
        return OwnerCopy("its owner gives no lease")
    if kind != _LEASED or not 0 < access <= EVERY_ACCESS:
        raise ControlError(f"an answer of kind {kind} with access {access}")
    return Lease(lease, UUID(bytes=region), "", offset, length, Access(access))


def _head(form: struct.Struct, body: bytes, what: str) -> tuple[Any, ...]:
    if len(body) < form.size:
        raise ControlError(f"{what} of {len(body)} bytes, it has {form.size} at least")
    return form.unpack_from(body)
