"""What tests of tracing share: two ends of a trace ring in this process, and a checker of Perfetto's format."""

from __future__ import annotations

import struct
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from support import LocalRegion

from idc.channel import ByteChannel
from idc.layout import ChannelSpec, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from idc.region import Region

RING = 64 << 10


@contextmanager
def trace_ring(size: int = RING) -> Iterator[tuple[ByteChannel, Region, ByteChannel]]:
    """The writer's channel, the recorder's region and channel."""
    region = LocalRegion([ChannelSpec("trace", Kind.BYTE, "front", "back", size)], 8 * size)
    try:
        with region.join(0) as front, region.join(1) as back:
            writer, recorder = (ByteChannel.begin(end, "trace") for end in (front, back))
            done: set[ByteChannel] = set()
            while len(done) < 2:
                done |= {channel for channel in (writer, recorder) if channel not in done and channel.advance()}
            try:
                yield writer, back, recorder
            finally:
                writer.close()
                recorder.close()
    finally:
        region.close()


# -- Perfetto's format: protobuf by hand, and the rules of its tracks


def fields(data: bytes) -> dict[int, list[Any]]:
    """A protobuf message: field number to its values. Raises ValueError for what is none."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value
            if shift > 63:
                raise ValueError("a varint of more than 10 bytes")

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            value: Any = varint()
        elif wire == 1:
            (value,) = struct.unpack_from("<Q", data, at)
            at += 8
        elif wire == 2:
            length = varint()
            value = data[at:at + length]
            if len(value) != length:
                raise ValueError("a field longer than its message")
            at += length
        else:
            raise ValueError(f"wire type {wire}")
        found.setdefault(key >> 3, []).append(value)
    return found


@dataclass
class Checked:
    """What a checked file holds.

    Attributes:
        processes: track to name.
        parents: track to the one above.
        names: of all tracks.
        begins: (time, track, name, flow) of each slice.
        flows: how often each was named.
        instants, counters: names, and values by track.
    """

    processes: dict[int, str] = field(default_factory=dict)
    labels: dict[int, list[str]] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    begins: list[tuple[int, int, str, int]] = field(default_factory=list)
    flows: Counter[int] = field(default_factory=Counter)
    instants: list[tuple[int, int, str]] = field(default_factory=list)
    counters: dict[int, list[int]] = field(default_factory=dict)

    def domain(self, track: int) -> str:
        """The domain that a track is below."""
        while track not in self.processes:
            track = self.parents[track]
        return self.processes[track]

    def arrows(self) -> list[tuple[tuple[int, str], tuple[int, str]]]:
        """((time, domain) of the submission, of its handling) of each flow."""
        ends: dict[int, list[tuple[int, str, str]]] = {}
        for at, track, name, flow in self.begins:
            if flow:
                ends.setdefault(flow, []).append((at, self.domain(track), name))
        found = []
        for both in ends.values():
            (submit,) = [end for end in both if "submitted" in end[2]]
            (handle,) = [end for end in both if "handled" in end[2]]
            found.append((submit[:2], handle[:2]))
        return found


def check_perfetto(path: Path) -> Checked:
    """Check a file by the rules of the format, and by the classes that Perfetto publishes."""
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as schema

    data = path.read_bytes()
    trace = schema.Trace()
    trace.ParseFromString(data)
    assert trace.IsInitialized()
    assert not _unknown(trace), "fields that Perfetto does not know"
    packets = fields(data)[1]
    assert len(packets) == len(trace.packet)
    checked, last, depth = Checked(), -1, Counter[int]()
    for packet, raw in zip(trace.packet, packets, strict=True):
        assert fields(raw)[10] == [packet.trusted_packet_sequence_id]
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert track.uuid not in checked.names, "a track is declared once"
            checked.names[track.uuid] = track.process.process_name or track.name
            if track.HasField("process"):
                checked.processes[track.uuid] = track.process.process_name
                checked.labels[track.uuid] = list(track.process.process_labels)
            else:
                assert track.parent_uuid in checked.names, "a track's parent comes before it"
                checked.parents[track.uuid] = track.parent_uuid
            if track.HasField("counter"):
                checked.counters[track.uuid] = []
            continue
        event, at = packet.track_event, packet.timestamp
        assert at >= last, "events are in the order of time"
        last = at
        assert event.track_uuid in checked.names, "a track is declared before it is used"
        checked.flows.update(event.flow_ids)
        if event.type == event.TYPE_SLICE_BEGIN:
            depth[event.track_uuid] += 1
            checked.begins.append((at, event.track_uuid, event.name, event.flow_ids[0] if event.flow_ids else 0))
        elif event.type == event.TYPE_SLICE_END:
            depth[event.track_uuid] -= 1
            assert depth[event.track_uuid] >= 0, "a slice ends that did not begin"
        elif event.type == event.TYPE_INSTANT:
            checked.instants.append((at, event.track_uuid, event.name))
        else:
            assert event.type == event.TYPE_COUNTER
            checked.counters[event.track_uuid].append(event.counter_value)
    assert not +depth, "every slice ends"
    assert set(checked.flows.values()) <= {2}, "a flow joins two"
    return checked


def _unknown(message: Any) -> bool:
    from google.protobuf.unknown_fields import UnknownFieldSet

    return len(UnknownFieldSet(message)) > 0 or any(
        _unknown(each) for kind, value in message.ListFields() if kind.message_type is not None
        for each in (value if kind.is_repeated else [value]))
