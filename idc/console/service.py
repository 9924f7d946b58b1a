"""How much the two ends of a console device accept of each other. Depends on idc.console.protocol and idc.domain."""

from __future__ import annotations

from typing import Final

from idc.console import protocol
from idc.domain import Service
from idc.endpoint import Quotas

#: Programs that are attached over one device at a time, and requests of each under way: READ, WRITE, one more.
PROGRAMS: Final = 18
REQUESTS: Final = 3
#: Of the device itself: those, and some for the front end's own.
_DEVICE: Final = PROGRAMS * REQUESTS + 6
#: What the ends of a device accept of each other, and the process that has the terminals of its back end.
SERVICE: Final = Service("console", Quotas(_DEVICE, 0, protocol.PARAMETER_BYTES, protocol.STATUS_BYTES), _DEVICE)
#: The same of a program and its front end.
PROGRAM: Final = Service("console", Quotas(REQUESTS, 0, protocol.PARAMETER_BYTES, protocol.STATUS_BYTES), REQUESTS)
