"""Names for what both ends of a connection know, to join in a trace what each logs. Depends on the standard library."""

from __future__ import annotations

from hashlib import blake2b


def flow_seed(known: bytes) -> int:
    """64 bits derived from what both ends of a connection know and no other connection has. No secret."""
    return int.from_bytes(blake2b(known, digest_size=8).digest(), "little")
