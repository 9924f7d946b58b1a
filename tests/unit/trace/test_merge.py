"""Merging whatever files hold: events that mean nothing, times that lie, flows that several claim."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from trace_support import check_perfetto

from idc.trace.events import COUNTER, SYNC, Kind, TraceEvent, Type, encode
from idc.trace.hook import MOMENT
from idc.trace.store import StoreWriter, read
from testbed.errors import SpecError
from testbed.trace.align import load
from testbed.trace.merge import merge
from testbed.trace.perfetto import EventType, Writer

SECOND = 1_000_000_000
TIME = st.one_of(st.integers(0, 100), st.integers(0, 10 * SECOND), st.integers(0, (1 << 64) - 1))
SMALL = st.integers(0, 3)
EVENT = st.builds(TraceEvent, time=TIME, flow=SMALL, sequence=SMALL, lane=SMALL, type=st.sampled_from(list(Type)),
                  kind=st.sampled_from(list(Kind)), name=st.sampled_from([b"", b"a", b"\xff\x1b"]),
                  data=st.one_of(st.binary(max_size=40), st.builds(SYNC.pack, TIME, TIME, TIME, TIME),
                                 st.builds(MOMENT.pack, TIME, st.sampled_from([4, 5, 68, 69, 200]), SMALL)),
                  detail=st.sampled_from([2, 4, 13, 200]), value=SMALL)


def write(directory: Path, domain: str, recorder: str, listed: list[TraceEvent]) -> Path:
    with StoreWriter(directory, domain, recorder) as writer:
        writer.append(b"".join(map(encode, listed)))
    return writer.path


def event(time: int, kind: Kind = Kind.USER, type_: Type = Type.INSTANT, **fields: Any) -> TraceEvent:
    return TraceEvent(time, 0, 0, 0, type_, kind, b"", b"", 0, 0)._replace(**fields)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(st.lists(EVENT, min_size=1, max_size=25), st.lists(EVENT, max_size=25), st.booleans())
@example([event(5, Kind.SUBMIT, flow=1), event(1, Kind.SUBMIT, flow=1)], [event(3, Kind.HANDLE, flow=1)], True)
def test_whatever_domains_claim_the_file_keeps_the_rules(one: list[TraceEvent], two: list[TraceEvent],
                                                         compared: bool) -> None:
    if compared:
        one = [event(0, Kind.SYNC, data=SYNC.pack(10, 30, 1015, 1020)), *one]
    with tempfile.TemporaryDirectory() as name:
        paths = [write(Path(name), "front", "back", one), write(Path(name), "back", "back", two)]
        output = Path(name, "out")
        try:
            report = merge(paths, output)
        except SpecError as error:
            if output.exists() or not any(why in error.message for why in ("never compared", "no events")):
                raise
            return
        checked = check_perfetto(output)
        assert sum(domain.events for domain in report.domains) == sum(len(list(read(path).events())) for path in paths)
        assert len(checked.arrows()) == report.arrows


def test_a_tag_that_comes_again_is_joined_to_the_submission_before(tmp_path: Path) -> None:
    sync = [event(time, Kind.SYNC, data=SYNC.pack(time, time + 20, time + 1010, time + 1010)) for time in (0, 10_000)]
    front, back = list(sync), []
    for n in range(5):
        at = 1000 * n
        front += [event(at, Kind.SUBMIT, Type.BEGIN, flow=7, detail=4), event(at + 400, Kind.COMPLETE, Type.END, flow=7,
                                                                              detail=4)]
        back += [event(at + 1100, Kind.HANDLE, Type.BEGIN, flow=7, detail=4),
                 event(at + 1300, Kind.ANSWER, Type.END, flow=7, detail=4)]
    paths = [write(tmp_path, "front", "back", front), write(tmp_path, "back", "back", back)]
    assert merge(paths, tmp_path / "out").across == 5
    arrows = sorted(check_perfetto(tmp_path / "out").arrows())
    assert all(0 < handled[0] - sent[0] < 200 for sent, handled in arrows)


def test_what_a_writer_did_not_say_it_dropped_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, "a", "a", [event(1), event(2, sequence=3), event(3, Kind.DROPPED, sequence=9, value=4),
                                      event(4, sequence=10)])
    source = load(read(path))
    assert (source.missing, source.dropped) == (2 + 1, 4)


def test_slices_counters_and_names_are_drawn(tmp_path: Path) -> None:
    path = write(tmp_path, "front", "front", [
        event(1, Kind.LANE, name=b"pump", lane=2), event(2, type_=Type.BEGIN, name=b"outer", lane=2),
        event(3, type_=Type.BEGIN, name=b"inner", data=b"page 12", lane=2), event(4, type_=Type.END, lane=2),
        event(5, type_=Type.COUNTER, name=b"level", data=COUNTER.pack(-3)), event(6, name=b"x\x1b[31m")])
    merge([path], tmp_path / "out")
    checked = check_perfetto(tmp_path / "out")
    assert [(name, checked.names[track]) for _, track, name, _ in checked.begins] == [
        ("outer", "pump"), ("inner", "pump")]
    assert list(checked.counters.values()) == [[-3]]
    assert [name for _, _, name in checked.instants] == ["x?[31m"]


def test_an_empty_trace_is_not_merged(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no events"):
        merge([write(tmp_path, "a", "a", [])], tmp_path / "out")


def test_each_field_that_is_written_is_the_one_perfetto_reads(tmp_path: Path) -> None:
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as schema

    data = bytearray()
    writer = Writer(data.extend)
    top = writer.process(3, "front", ["near"])
    row = writer.track(top, "lane")
    writer.event(1 << 40, row, EventType.SLICE_BEGIN, "begin", "idc", notes={"tag": -5, "data": "x"}, flow=1 << 63)
    writer.event((1 << 40) + 1, row, EventType.COUNTER, value=-(1 << 63))
    trace = schema.Trace()
    trace.ParseFromString(bytes(data))
    process, lane, begin, counter = trace.packet
    assert process.sequence_flags == process.SEQ_INCREMENTAL_STATE_CLEARED
    assert (process.track_descriptor.process.pid, process.track_descriptor.process.process_labels[0]) == (3, "near")
    assert (lane.track_descriptor.parent_uuid, lane.track_descriptor.name) == (top, "lane")
    assert (begin.timestamp, begin.track_event.name, begin.track_event.categories[0]) == (1 << 40, "begin", "idc")
    assert list(begin.track_event.flow_ids) == [1 << 63]
    assert [(note.name, note.int_value, note.string_value) for note in begin.track_event.debug_annotations] == [
        ("tag", -5, ""), ("data", 0, "x")]
    assert counter.track_event.counter_value == -(1 << 63)
