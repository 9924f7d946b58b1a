"""Buffers of one domain used from another: registered, referred to, forwarded, read, filled, revoked.

docs/remote-buffers.md has data flow, frames, routes and what a refusal is worth.
"""

from idc.remote.borrow import Borrowed
from idc.remote.broker import Broker
from idc.remote.buffer import RemoteBuffer
from idc.remote.exports import Exports
from idc.remote.reference import Access, Reference
from idc.remote.regions import Regions
from idc.remote.registration import Holder, Registration
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused, Resolution
from idc.remote.resources import Remote
from idc.remote.routes import Route, Worth

__all__ = ["Access", "Borrowed", "Broker", "Exports", "Holder", "Lease", "OwnerCopy", "Reference", "Refusal", "Refused",
           "Regions", "Registration", "Remote", "RemoteBuffer", "Resolution", "Route", "Worth"]
