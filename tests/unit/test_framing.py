"""The agent link's frames: any split, any garbage, never a frame that was not sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idc import framing
from idc.framing import Frame, FrameReader

FRAMES = st.lists(
    st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 255), st.binary(max_size=5000)),
    max_size=8,
)


def plain(frame: Frame) -> tuple[int, int, int, bytes]:
    return frame.session, frame.channel, frame.kind, bytes(frame.payload)


@given(FRAMES, st.lists(st.integers(1, 3000), min_size=1))
def test_frames_survive_any_split(frames: list[tuple[int, int, int, bytes]], cuts: list[int]) -> None:
    stream = b"".join(framing.encode(*frame) for frame in frames)
    reader, got, at, turn = FrameReader(), [], 0, 0
    while at < len(stream):
        step = cuts[turn % len(cuts)]
        got += [plain(frame) for frame in reader.feed(stream[at : at + step])]
        at, turn = at + step, turn + 1
    assert got == frames
    assert reader.skipped == 0


@given(st.binary(max_size=3000), st.binary(max_size=3000))
def test_a_reader_finds_its_place_after_garbage(garbage: bytes, payload: bytes) -> None:
    reader = FrameReader()
    got = [plain(frame) for frame in reader.feed(garbage + framing.encode(7, 1, framing.DATA, payload))]
    assert got[-1:] == [(7, 1, framing.DATA, payload)]
    assert reader.skipped == len(garbage)


def test_half_a_frame_before_a_fresh_one_costs_no_more_than_its_length() -> None:
    half = framing.encode(1, 1, framing.DATA, b"x" * 1000)[:500]
    reader = FrameReader()
    got = list(reader.feed(half + framing.encode(2, 0, framing.READY, b"") * 40))
    # The rest of the half frame was taken from the first fresh ones; all later ones arrive.
    assert plain(got[-1]) == (2, 0, framing.READY, b"")
    assert len(got) >= 10


def test_the_longest_payload_fits_and_one_byte_more_does_not() -> None:
    payload = bytes(framing.MAX_PAYLOAD)
    reader = FrameReader()
    assert [plain(f) for f in reader.feed(framing.encode(1, 2, 3, payload) * 3)] == [(1, 2, 3, payload)] * 3
    with pytest.raises(ValueError, match="at most"):
        framing.encode(1, 2, 3, payload + b"!")


def test_a_header_with_a_damaged_length_is_not_believed() -> None:
    frame = bytearray(framing.encode(1, 2, 3, b"abc"))
    frame[12] ^= 1
    assert list(FrameReader().feed(bytes(frame))) == []


def test_json_payloads_must_be_objects() -> None:
    (frame,) = FrameReader().feed(framing.encode(1, 2, 3, b"[1]"))
    with pytest.raises(ValueError, match="not a JSON object"):
        frame.json()
