"""A reference to a registered buffer: fixed bytes that go in any message, unguessable, and never an address.

Only the owner's library mints one and only it can check one: by computing the code at its end again, with a secret of
the registration. Docs: docs/remote-buffers.md. Depends on idc.errors.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from idc.errors import MisuseError
from idc.layout import PAGE

#: The first bytes; the last of them is the version.
MAGIC: Final = b"IDR1"
_FIELDS: Final = struct.Struct("<4sBBH16sQIIQQ")
_CODE_BYTES: Final = 16
#: Bytes of a reference.
REFERENCE_BYTES: Final = _FIELDS.size + _CODE_BYTES
#: Bytes of a registration's secret.
SECRET_BYTES: Final = 32


class Access(enum.IntFlag):
    """What a reference, or a lease, allows. TAKE: hand the pages over until they are given back."""

    READ = 1
    WRITE = 2
    TAKE = 4

    def __str__(self) -> str:
        return " and ".join(str(one.name).lower() for one in type(self) if one in self) or "nothing"


#: All that a reference can allow.
EVERY_ACCESS: Final = Access.READ | Access.WRITE | Access.TAKE


@dataclass(frozen=True, slots=True)
class Reference:
    """What the bytes say. Nothing of it counts before the owner has checked the code.

    Attributes:
        owner: domain that registered the buffer.
        incarnation: of that domain when it did.
        slot: of its table of registrations.
        generation: of that slot.
        access: what the holder may do.
        offset: of the first byte within the registration, bytes.
        length: bytes.
        offset_in_page: where in its page the first byte lies, so that who receives can allocate alike.
    """

    owner: UUID
    incarnation: int
    slot: int
    generation: int
    access: Access
    offset: int
    length: int
    offset_in_page: int = 0

    @property
    def registration(self) -> tuple[UUID, int, int, int]:
        """What is named, whatever part of it and whatever rights."""
        return self.owner, self.incarnation, self.slot, self.generation


def mint(reference: Reference, secret: bytes) -> bytes:
    """The bytes of a reference, with its code. Raises MisuseError for a field that does not fit."""
    try:
        fields = _FIELDS.pack(MAGIC, reference.access, 0, reference.offset_in_page, reference.owner.bytes,
                              reference.incarnation, reference.slot, reference.generation, reference.offset,
                              reference.length)
    except struct.error as error:
        raise MisuseError(f"{reference} is no reference: {error}") from error
    return fields + _code(fields, secret)


def parse(data: bytes) -> Reference:
    """What the bytes say; whether it is true, only the owner knows. Raises MisuseError, in words, if they are none."""
    if len(data) != REFERENCE_BYTES:
        raise MisuseError(f"a reference has {REFERENCE_BYTES} bytes, not {len(data)}")
    magic, access, zero, inside, owner, incarnation, slot, generation, offset, length = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        raise MisuseError(f"a reference begins with {MAGIC!r}, not with {magic!r}")
    if zero or not 0 < access <= EVERY_ACCESS or inside >= PAGE or offset + length >= 1 << 64:
        raise MisuseError("a field of the reference holds what no owner mints")
    return Reference(UUID(bytes=owner), incarnation, slot, generation, Access(access), offset, length, inside)


def genuine(data: bytes, secret: bytes) -> bool:
    """Whether the code was computed with that secret over just these fields."""
    return hmac.compare_digest(data[_FIELDS.size:], _code(data[:_FIELDS.size], secret))


def _code(fields: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, fields, hashlib.sha256)[:_CODE_BYTES]
