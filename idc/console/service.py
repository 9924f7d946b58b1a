"""How much the two ends of a console device accept of each other. Depends on idc.console.protocol and idc.endpoint."""

from __future__ import annotations

from typing import Final

from idc.console import protocol
from idc.endpoint import Quotas, Resources

#: Programs that are attached over one device at a time, and requests of each under way: READ, WRITE, one more.
PROGRAMS: Final = 18
REQUESTS: Final = 3
#: Requests under way over the device itself: those, and some of the front end's own.
ALL: Final = PROGRAMS * REQUESTS + 6


def quotas(requests: int) -> Quotas:
    """For so many at a time, and no messages."""
    return Quotas(requests, 0, protocol.PARAMETER_BYTES, protocol.STATUS_BYTES)


def resources(requests: int) -> Resources:
    """Of one end."""
    return Resources(quotas(requests), requests=requests, messages=0)
