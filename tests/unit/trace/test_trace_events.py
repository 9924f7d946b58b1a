"""The event format and the files: what is written is read, and what is torn or forged is recognised."""

import os
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.errors import MisuseError, ProtocolError
from idc.trace import events, store
from idc.trace.events import HEADER_BYTES, PAYLOAD_BYTES, Kind, TraceEvent, Type, encode, split, whole
from idc.trace.store import CHUNK, EVENTS, LEAST_FILE, FullError, StoreWriter, read

U64 = st.integers(0, (1 << 64) - 1)
EVENT = st.builds(TraceEvent, time=U64, flow=U64, sequence=st.integers(0, (1 << 32) - 1),
                  lane=st.integers(0, 0xFFFF), type=st.sampled_from(list(Type)), kind=st.sampled_from(list(Kind)),
                  name=st.binary(max_size=255), data=st.binary(max_size=300), detail=st.integers(0, 255),
                  value=st.integers(0, (1 << 32) - 1))

#: How long one example takes says nothing on a machine that others use too.
PATIENT = settings(deadline=None)


@PATIENT
@given(st.lists(EVENT, max_size=8))
def test_what_is_encoded_is_split(listed: list[TraceEvent]) -> None:
    run = b"".join(map(encode, listed))
    assert list(split(run)) == listed
    assert whole(run)[0] == len(run)


@PATIENT
@given(st.lists(EVENT, min_size=1, max_size=5), st.integers(0, 5000))
def test_a_run_cut_anywhere_gives_the_events_before(listed: list[TraceEvent], cut: int) -> None:
    run = b"".join(map(encode, listed))[:cut]
    end, _ = whole(run)
    found = list(split(run[:end]))
    assert found == listed[:len(found)]
    assert len(run) - end < HEADER_BYTES + PAYLOAD_BYTES


@PATIENT
@given(st.binary(max_size=4000))
def test_whatever_a_writer_sends_is_events_or_refused(data: bytes) -> None:
    try:
        end, pings = whole(data)
    except ProtocolError:
        return
    assert 0 <= end <= len(data)
    assert all(events.HEADER.unpack_from(data, at)[5] == Kind.PING for at in pings)
    assert sum(HEADER_BYTES + len(event.name) + len(event.data) for event in split(data[:end])) == end


def test_the_longest_payload_fits_and_one_byte_more_does_not() -> None:
    event = TraceEvent(1, 0, 0, 0, Type.INSTANT, Kind.USER, b"n" * 255, b"d" * (PAYLOAD_BYTES - 255), 0, 0)
    assert list(split(encode(event))) == [event]
    with pytest.raises(MisuseError, match="4097 bytes"):
        encode(event._replace(data=event.data + b"d"))
    with pytest.raises(MisuseError, match="name of 256 bytes"):
        encode(event._replace(name=b"n" * 256, data=b""))


RUN = b"".join(encode(TraceEvent(n, 0, n, 0, Type.INSTANT, Kind.USER, b"n", bytes(n % 7), 0, n)) for n in range(50))


def written(directory: Path, pieces: int = 5) -> Path:
    with StoreWriter(directory, "front", "back") as writer:
        step = len(RUN) // pieces + 1
        for at in range(0, len(RUN), step):
            writer.append(RUN[at:at + step])
    return writer.path


def test_a_file_says_whose_it_is_and_why_it_ended(tmp_path: Path) -> None:
    path = written(tmp_path / "made")
    found = read(path)
    assert path.name == "front.1.idctrace"
    assert (found.domain, found.recorder, found.ended, found.unread) == ("front", "back", "closed", 0)
    assert b"".join(map(encode, found.events())) == RUN
    assert written(tmp_path / "made").name == "front.2.idctrace"


def test_a_tail_torn_at_any_byte_is_recognised(tmp_path: Path) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    first = CHUNK.unpack_from(data, 8)[1] + CHUNK.size + 8
    ends = [first]
    while ends[-1] < len(data):
        ends.append(ends[-1] + CHUNK.size + CHUNK.unpack_from(data, ends[-1])[1])
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        if cut < first:
            with pytest.raises(ProtocolError, match="is no trace"):
                read(path)
            continue
        found = read(path)
        assert found.ended == ""
        assert found.unread == cut - max(end for end in ends if end <= cut)
        there = b"".join(map(encode, found.events()))
        assert RUN.startswith(there)


@PATIENT
@given(st.integers(0, 1 << 32), st.integers(1, 255))
def test_a_byte_that_was_changed_ends_the_file_there(seed: int, flip: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = written(Path(directory))
        data = bytearray(path.read_bytes())
        at = random.Random(seed).randrange(len(data))
        data[at] ^= flip
        path.write_bytes(data)
        try:
            found = read(path)
        except ProtocolError:
            return
        there = b"".join(map(encode, found.events()))
        assert RUN.startswith(there)
        assert found.unread > 0


@PATIENT
@given(st.binary(max_size=2000))
def test_any_bytes_are_a_trace_or_refused(data: bytes) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        origin = b'{"domain": "front", "recorder": "back"}'
        for content in (data, store.MAGIC + data, store.MAGIC + _chunk(1, origin) + _chunk(EVENTS, data) + data):
            Path(file.name).write_bytes(content)
            try:
                found = read(Path(file.name))
            except ProtocolError:
                continue
            listed = list(found.events())
            assert bool(found.broken) or b"".join(map(encode, listed)) == data[:len(data) - found.unread][:len(data)] \
                or found.unread > 0


def _chunk(kind: int, body: bytes) -> bytes:
    checksum = zlib.crc32(body, zlib.crc32(CHUNK.pack(kind, len(body), 0)))
    return CHUNK.pack(kind, len(body), checksum) + body


def test_a_domain_cannot_take_more_than_its_limit(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, "front", "back", most_bytes=3 * LEAST_FILE)
    for _ in range(3 * LEAST_FILE // (len(RUN) + CHUNK.size) - 1):
        writer.append(RUN)
    with pytest.raises(FullError, match=r"front\.1\.idctrace is full"):
        writer.append(2 * RUN)
    writer.close("no room")
    assert read(writer.path).ended == "no room"
    with pytest.raises(FullError, match="which is the limit"):
        StoreWriter(tmp_path, "front", "back", most_bytes=3 * LEAST_FILE)
    assert os.listdir(tmp_path) == ["front.1.idctrace"]
    StoreWriter(tmp_path, "other", "back", most_bytes=3 * LEAST_FILE).close()


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "x" * 65, "a b"])
def test_a_name_that_could_lead_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="domain"):
        StoreWriter(tmp_path, name, "back")
    assert os.listdir(tmp_path) == []
