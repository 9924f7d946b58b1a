"""The broker: copies bytes between regions for domains that share none, after it has checked that both may be touched.

docs/broker.md has data flow, who checks what, what each refusal is worth, quotas and crash behaviour.
"""

from __future__ import annotations

from typing import Final

#: The broker's member name in each control region, so no domain may be called that.
MEMBER: Final = "broker"
#: The channel of a control region that its endpoint uses.
CHANNEL: Final = "control"
#: Bytes of a message slot of it: the longest frame and the slot's header fit.
SLOT_BYTES: Final = 512
#: Bytes of each direction's ring: 256 slots, more than the quotas of either side need.
RING_BYTES: Final = 256 * SLOT_BYTES
