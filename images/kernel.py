"""The kernel's file formats. Pure; source: Documentation/arch/x86/boot.rst."""

from __future__ import annotations

import lzma
import struct
import zlib

from images.errors import ImageError

_SECTOR = 512
_MAGIC_AT, _MAGIC = 0x202, b"HdrS"


def unpack_bzimage(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage: QEMU starts it by its PVH entry, and the guest need not unpack it.

    Unpacking xz takes an emulated processor seconds, at each boot. Raises ImageError for what is not a bzImage or is
    packed in a way Debian does not use.
    """
    if len(image) < 0x250 or struct.unpack_from("<4s", image, _MAGIC_AT)[0] != _MAGIC:
        raise ImageError("the kernel is not a bzImage")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * _SECTOR + offset
    payload = image[start : start + length]
    unpacker: lzma.LZMADecompressor | zlib._Decompress
    if payload.startswith(b"\xfd7zXZ"):
        unpacker = lzma.LZMADecompressor()
    elif payload.startswith(b"\x1f\x8b"):
        unpacker = zlib.decompressobj(31)
    else:
        raise ImageError(f"the kernel is packed in an unknown way (starts with {payload[:4].hex()})")
    try:
        # behind the stream stand four bytes of unpacked size, which belong to neither format
        elf = unpacker.decompress(payload)
    except (lzma.LZMAError, zlib.error) as error:
        raise ImageError(f"the kernel cannot be unpacked: {error}") from error
    if not unpacker.eof:
        raise ImageError("the kernel is cut off")
    if not elf.startswith(b"\x7fELF"):
        raise ImageError("the kernel's payload is not an ELF file")
    return elf
