"""What the two ends of a block device say to each other: parameters and status of transactions. No I/O.

Offsets and lengths are bytes: nothing here knows of blocks, but that the geometry says which sizes serve the image
best. The error of a reply is an errno of Linux. Depends on idc.errors; image.c has the same numbers.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from idc.errors import ProtocolError

#: Version of all this, which the geometry begins with.
VERSION: Final = 1
REQUEST: Final = struct.Struct("<BBHIQQQ")
GEOMETRY: Final = struct.Struct("<HHIQIIQ16s")


class Op(enum.IntEnum):
    """What is asked."""

    GEOMETRY = 0
    READ = 1
    WRITE = 2
    FLUSH = 3
    TRIM = 4
    ZEROES = 5


class Can(enum.IntFlag):
    """What an image can do, and cannot."""

    READ_ONLY = 1
    TRIM = 2
    ROTATES = 4


#: Flag of a write, trim or zeroes: it is on the disk when it is answered.
FUA: Final = 1


@dataclass(frozen=True, slots=True)
class Request:
    """One request.

    Attributes:
        op: what.
        offset, length: bytes of the image; 0 for GEOMETRY and FLUSH.
        buffer: of READ and WRITE, where the bytes go or come from: offset in the region, in the front end's part.
        fua: not of READ and FLUSH.
    """

    op: Op
    offset: int = 0
    length: int = 0
    buffer: int = 0
    fua: bool = False

    def pack(self) -> bytes:
        """As parameters."""
        return REQUEST.pack(self.op, FUA if self.fua else 0, 0, 0, self.offset, self.length, self.buffer)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the back end says of its image.

    Attributes:
        size: bytes.
        can: see Can.
        preferred: bytes that requests had best be multiples of.
        minimum: bytes that any request must be a multiple of; 1 for most images.
        longest: bytes of one READ or WRITE at most.
        image: names the image, the same for as long as it is the same one.
    """

    size: int
    can: Can
    preferred: int
    minimum: int
    longest: int
    image: bytes

    def pack(self) -> bytes:
        """As status."""
        return GEOMETRY.pack(VERSION, self.can, 0, self.size, self.preferred, self.minimum, self.longest, self.image)

    @classmethod
    def parse(cls, status: bytes) -> Geometry:
        """From what a peer says. Raises ProtocolError."""
        if len(status) != GEOMETRY.size:
            raise ProtocolError(f"a geometry of {len(status)} bytes, {GEOMETRY.size} are expected")
        version, flags, zero, size, preferred, minimum, longest, image = GEOMETRY.unpack(status)
        if version != VERSION or zero:
            raise ProtocolError(f"a geometry of version {version}, {VERSION} is spoken here")
        if flags & ~int(Can.READ_ONLY | Can.TRIM | Can.ROTATES):
            raise ProtocolError(f"a geometry with unknown flags {flags:#x}")
        if not 0 < size < 1 << 63 or not 0 < longest < 1 << 32:
            raise ProtocolError(f"an image of {size} bytes, {longest} at a time, is none")
        for what, value in (("preferred", preferred), ("minimum", minimum)):
            if not 0 < value <= 1 << 26 or value & (value - 1):
                raise ProtocolError(f"a {what} block of {value} bytes is no power of two up to 64 MiB")
        return cls(size, Can(flags), preferred, minimum, longest, image)
