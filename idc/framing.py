"""Frames on the management link between a guest's agent and the host; the same code at both ends.

Pure: no I/O, standard library only, and little of that, because importing is slow in an emulated guest.

The link is one virtio-serial port: a reliable byte stream, but one whose ends come and go by themselves, so
that either may find the rest of a frame that the one before it never finished. Hence each frame starts with a
magic number and a checksum of its header (a reader that lost its place hunts for the next header), and
carries a session number that the host draws at random whenever it starts afresh: frames of an earlier session
are recognised and dropped.

    offset  size  field
    0       4     magic, "IDCa"
    4       4     session, drawn by the host; 0 from an agent that has not heard HELLO yet
    8       4     channel: the call that the frame belongs to; 0 for the link itself
    12      4     length of the payload in bytes, at most MAX_PAYLOAD
    16      1     kind, one of the constants below
    17      1     zero
    18      2     CRC-16 (CCITT, as binascii.crc_hqx) of bytes 0 to 17

All integers are little-endian. Control payloads are JSON objects, data payloads raw bytes.

Flow control: each data stream (a file, standard input, both outputs of a command together) has WINDOW bytes
of credit. The sender takes from it what it sends, the receiver gives back with CREDIT what it has dealt with.
So both ends need a bounded amount of memory, and a slow stream never holds up the others for longer than one
window.
"""

from __future__ import annotations

import binascii
import json
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

PORT_NAME: Final = "org.idc-testbed.agent"
"""Name of the virtio-serial port, as in /sys/class/virtio-ports/*/name."""
PROTOCOL: Final = 2
"""Raised with each change that an older end would misread."""

MAGIC: Final = 0x61434449
HEADER: Final = struct.Struct("<IIIIBBH")
_CHECKED: Final = HEADER.size - 2
_MAGIC_BYTES: Final = MAGIC.to_bytes(4, "little")
MAX_PAYLOAD: Final = 128 * 1024
"""Largest payload in bytes: long enough to make the cost of a call in the guest small, short enough that
frames of other calls get a turn."""
WINDOW: Final = 1024 * 1024
"""Credit of a stream at its start, in bytes."""

# Either way.
HELLO: Final = 1  # host: begin this session; {"protocol"}
READY: Final = 2  # guest: {"protocol", "boot_id", "uptime", "kernel", "python", "host", "pid"}
PING: Final = 3
PONG: Final = 4
DATA: Final = 5  # bytes of a file, or of standard input towards a command
END: Final = 6  # the stream is complete; {"size"}
CREDIT: Final = 7  # {"bytes"}
CANCEL: Final = 8  # host: forget this call; undo what is half done, kill the process group
ERROR: Final = 9  # guest: {"errno", "text"}; the call is over
DONE: Final = 10  # guest: the call is over, well; {...}
# Host to guest.
EXEC: Final = 16  # {"argv", "cwd", "env", "stdin"}
KILL: Final = 17  # {"signal"}: to the process group
PUSH: Final = 18  # {"path", "mode", "size"}
PULL: Final = 19  # {"path"}
POWEROFF: Final = 20
IDENTITY: Final = 21  # become somebody else after a clone; fields in guest/identity.py. READY with the new ones, DONE
# Guest to host.
STARTED: Final = 32  # {"pid"}
STDOUT: Final = 33
STDERR: Final = 34
EXIT: Final = 35  # {"code"}: as in subprocess, minus the signal's number if a signal ended it
META: Final = 36  # {"size", "mode"}: of the file that is pulled


class Frame(NamedTuple):
    """One frame. `payload` is only valid until the reader is given more bytes: copy what is to last."""

    session: int
    channel: int
    kind: int
    payload: memoryview

    def json(self) -> dict[str, Any]:
        """The payload as a JSON object. Raises ValueError if it is anything else."""
        value = json.loads(bytes(self.payload))
        if not isinstance(value, dict):
            raise ValueError(f"frame of kind {self.kind}: the payload is not a JSON object")
        return value


def encode_header(session: int, channel: int, kind: int, length: int) -> bytes:
    """The header of a frame whose payload of `length` bytes follows. Raises ValueError if it is too long."""
    if length > MAX_PAYLOAD:
        raise ValueError(f"payload of {length} bytes; a frame holds at most {MAX_PAYLOAD}")
    head = HEADER.pack(MAGIC, session, channel, length, kind, 0, 0)[:_CHECKED]
    return head + binascii.crc_hqx(head, 0).to_bytes(2, "little")


def encode(session: int, channel: int, kind: int, payload: bytes | memoryview = b"") -> bytes:
    """One whole frame. Raises ValueError if the payload exceeds MAX_PAYLOAD."""
    return encode_header(session, channel, kind, len(payload)) + bytes(payload)


def encode_json(session: int, channel: int, kind: int, **fields: object) -> bytes:
    """One whole frame with a JSON object as payload."""
    return encode(session, channel, kind, json.dumps(fields).encode())


class FrameReader:
    """Turns a byte stream into frames: read into `space()`, tell `filled()`, take `frames()`.

    Starts out hunting for a header, and does so again after a bad one; `skipped` counts the bytes passed
    over. Memory is one buffer of fixed size.
    """

    def __init__(self) -> None:
        self._buffer = bytearray(2 * (MAX_PAYLOAD + HEADER.size))
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self.skipped = 0

    def reset(self) -> None:
        """Forget what is buffered and hunt for the next header: the other end has started afresh."""
        self._start = self._end = 0

    def space(self) -> memoryview:
        """Where to read the next bytes into; never empty. Payloads handed out before are no longer valid."""
        held = self._end - self._start
        if held == 0:
            self._start = self._end = 0
        elif len(self._buffer) - self._end < MAX_PAYLOAD:
            # Slices of one view may overlap: CPython copies by memmove.
            self._view[:held] = self._view[self._start : self._end]
            self._start, self._end = 0, held
        return self._view[self._end :]

    def filled(self, count: int) -> None:
        """The first `count` bytes of `space()` now hold data."""
        self._end += count

    def feed(self, data: bytes) -> Iterator[Frame]:
        """For callers that have bytes already: all frames that `data` completes. Any length."""
        rest = memoryview(data)
        while rest:
            room = self.space()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            self.filled(count)
            yield from self.frames()
            rest = rest[count:]

    def frames(self) -> Iterator[Frame]:
        """All complete frames, in order."""
        while self._end - self._start >= HEADER.size:
            start = self._start
            magic, session, channel, length, kind, _, check = HEADER.unpack_from(self._buffer, start)
            if (
                magic != MAGIC
                or length > MAX_PAYLOAD
                or check != binascii.crc_hqx(self._view[start : start + _CHECKED], 0)
            ):
                self._hunt()
                continue
            body = start + HEADER.size
            if self._end - body < length:
                return
            self._start = body + length
            yield Frame(session, channel, kind, self._view[body : body + length])

    def _hunt(self) -> None:
        """Move on to the next thing that looks like a magic number, at least one byte further."""
        found = self._buffer.find(_MAGIC_BYTES, self._start + 1, self._end)
        # The last three bytes may be the beginning of one.
        following = found if found >= 0 else max(self._start + 1, self._end - len(_MAGIC_BYTES) + 1)
        self.skipped += following - self._start
        self._start = following
