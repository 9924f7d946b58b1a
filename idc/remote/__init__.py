"""Buffers of one domain used from another: registered, referred to, forwarded, read, filled, revoked.

docs/remote-buffers.md has data flow, frames, routes and what a refusal is worth.
"""

from idc.remote.broker import Broker
from idc.remote.reference import Access, Reference
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused, Resolution

__all__ = ["Access", "Broker", "Lease", "OwnerCopy", "Reference", "Refusal", "Refused", "Resolution"]
