"""The registry: a tree of keys for all domains of a run, on disk, with permissions, watches and transactions.

docs/registry.md has tree, operations, permissions, quotas, errors and crash behaviour.
"""

from __future__ import annotations

from typing import Final

#: The registry's member name in each control region, so no domain may be called that.
MEMBER: Final = "registry"
#: The channel of a control region that its endpoint uses.
CHANNEL: Final = "registry"
#: Bytes of a message slot of it: the longest frame and the slot's header fit.
SLOT_BYTES: Final = 4096
#: Bytes of each direction's ring: 64 slots, more than the quotas of either side need.
RING_BYTES: Final = 64 * SLOT_BYTES
