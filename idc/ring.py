"""Rings of messages and of bytes between two domains, and doorbells: the Python face of the C core.

One producer and one consumer for each ring. A ring object belongs to one thread at a time; calls that wait
release the interpreter lock and let signals in. Depends on the modules it gathers, and they on idc._core,
which idc/core/build.py builds.

Timeouts are in seconds: None waits for ever, 0 does not wait. Every call may raise PeerGoneError and
CorruptError (both final; what the peer had published is delivered first) and ClosedError.
"""

from idc.bell import Bell
from idc.bytestream import ByteReceiver, ByteSender, Span
from idc.messages import MessageReceiver, MessageSender
from idc.ringbase import CONTROL_BYTES, DEFAULT_SPIN, POLL_ONLY, Counters, Ring
from idc.words import fence, load_u32, load_u64, store_u32, store_u64

__all__ = [
    "CONTROL_BYTES",
    "DEFAULT_SPIN",
    "POLL_ONLY",
    "Bell",
    "ByteReceiver",
    "ByteSender",
    "Counters",
    "MessageReceiver",
    "MessageSender",
    "Ring",
    "Span",
    "fence",
    "load_u32",
    "load_u64",
    "store_u32",
    "store_u64",
]
