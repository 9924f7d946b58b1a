"""Writes Perfetto's own trace format: protobuf messages, by their field numbers. Pure.

Only what a timeline of ours needs: tracks, slices, instants, counters, flows. Numbers are those of Perfetto's
protos/perfetto/trace: trace_packet.proto, track_event/{track_event,track_descriptor,debug_annotation}.proto; tests
read what is written here with the classes that Perfetto publishes.
"""

from __future__ import annotations

import enum
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PACKET: Final = 1
# of TracePacket
_TIMESTAMP, _SEQUENCE_ID, _TRACK_EVENT, _SEQUENCE_FLAGS, _TRACK_DESCRIPTOR = 8, 10, 11, 13, 60
_STATE_CLEARED: Final = 1
# of TrackEvent
_ANNOTATION, _TYPE, _TRACK, _CATEGORY, _NAME, _COUNTER_VALUE, _FLOW = 4, 9, 11, 22, 23, 30, 47
# of DebugAnnotation
_ANNOTATION_INT, _ANNOTATION_TEXT, _ANNOTATION_NAME = 4, 6, 10
# of TrackDescriptor
_UUID, _TRACK_NAME, _PROCESS, _PARENT, _COUNTER = 1, 2, 3, 5, 8
# of ProcessDescriptor
_PID, _PROCESS_NAME, _PROCESS_LABEL = 1, 6, 8
_SEQUENCE: Final = 1


class EventType(enum.IntEnum):
    """TrackEvent.Type."""

    SLICE_BEGIN = 1
    SLICE_END = 2
    INSTANT = 3
    COUNTER = 4


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode("utf-8", "replace"))


def _fixed(field: int, value: int) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<Q", value)


class Writer:
    """Packets, given to `write`. Timestamps are ns, in order."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._tracks = 0
        self._first = True

    def _packet(self, body: bytes) -> None:
        flags = _number(_SEQUENCE_FLAGS, _STATE_CLEARED) if self._first else b""
        self._first = False
        self._write(_bytes(_PACKET, _number(_SEQUENCE_ID, _SEQUENCE) + flags + body))

    def _track(self, body: bytes) -> int:
        self._tracks += 1
        self._packet(_bytes(_TRACK_DESCRIPTOR, _number(_UUID, self._tracks) + body))
        return self._tracks

    def process(self, pid: int, name: str, labels: Sequence[str] = ()) -> int:
        """The track of a domain; what others are below."""
        body = _number(_PID, pid) + _text(_PROCESS_NAME, name)
        return self._track(_bytes(_PROCESS, body + b"".join(_text(_PROCESS_LABEL, label) for label in labels)))

    def track(self, parent: int, name: str, *, counter: bool = False) -> int:
        """A row below another."""
        body = _number(_PARENT, parent) + _text(_TRACK_NAME, name)
        return self._track(body + (_bytes(_COUNTER, b"") if counter else b""))

    def event(self, at: int, track: int, type_: EventType, name: str = "", category: str = "", *,
              notes: Mapping[str, str | int] | None = None, flow: int = 0, value: int | None = None) -> None:
        """Something on a track. Events of one flow are joined by arrows, in the order of time."""
        body = _number(_TYPE, type_) + _number(_TRACK, track)
        if name:
            body += _text(_NAME, name)
        if category:
            body += _text(_CATEGORY, category)
        for key, note in (notes or {}).items():
            content = _number(_ANNOTATION_INT, note) if isinstance(note, int) else _text(_ANNOTATION_TEXT, note)
            body += _bytes(_ANNOTATION, _text(_ANNOTATION_NAME, key) + content)
        if flow:
            body += _fixed(_FLOW, flow)
        if value is not None:
            body += _number(_COUNTER_VALUE, value)
        self._packet(_number(_TIMESTAMP, at) + _bytes(_TRACK_EVENT, body))
