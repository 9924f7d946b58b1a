"""Dumps of regions: what is there is shown, what cannot be is named, and no bytes at all make it fail."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from support import local_region

from idc import dump, layout
from idc.channel import MessageChannel
from idc.layout import ChannelSpec, Kind, RegionHeader, Rights, pack_header

SIZE = 1 << 16
CHANNELS = (ChannelSpec("notes", Kind.MESSAGE, "a", "b", 4 * 64, 64), ChannelSpec("bulk", Kind.BYTE, "a", "b", 4096))
HEADER = RegionHeader.plan("x", SIZE, {"a": Rights.RW, "b": Rights.RW, "c": Rights.RO}, CHANNELS)


def page(**fields: object) -> bytearray:
    return bytearray(pack_header(replace(HEADER, **fields)) + bytes(SIZE - layout.PAGE))  # type: ignore[arg-type]


def test_a_fresh_region_has_no_problems() -> None:
    found = dump.decode(page())
    assert found.problems == ()
    assert [channel.connected for channel in found.channels] == [False, False]
    assert found.channels[0].rings[0].filled == 0
    text = "\n".join(dump.lines(found))
    assert "member 2 c: ro" in text
    assert "no inconsistency found" in text


def test_a_connected_channel_shows_what_comes_next() -> None:
    with local_region() as local, local.join(0) as front, local.join(1) as back, ThreadPoolExecutor(1) as pool:
        other = pool.submit(MessageChannel.attach, back, "notes", timeout=10)
        with MessageChannel.attach(front, "notes", timeout=10) as ours, other.result():
            for text in (b"one", b"three"):
                ours.sender.send(text)
            found = dump.decode(front.memory)
            assert found.problems == ()
            assert found.channels[0].connected
            ring = found.channels[0].rings[0]
            assert ring.filled == 2
            waiting = [(d.index, d.length, bytes.fromhex(d.start)) for d in ring.next]
            assert waiting == [(0, 3, b"one"), (1, 5, b"three")]


def connected_page() -> bytearray:
    data = page()
    for entry in HEADER.channels:
        for side, epoch, ack in ((layout.SIDE_A, 5, 6), (layout.SIDE_B, 6, 5)):
            at = entry.offset + side
            data[at : at + 8], data[at + 8 : at + 16] = epoch.to_bytes(8, "little"), ack.to_bytes(8, "little")
            data[at + layout.SIDE_STATE] = 1
    return data


def test_what_cannot_be_is_named() -> None:
    data = connected_page()
    notes, bulk = HEADER.channels
    data[notes.data_ab] = 3  # a sequence number of another lap
    data[bulk.offset + layout.RING_AB + layout.RING_TAIL + 2] = 1  # 65,536 bytes in a ring of 4,096
    problems = dump.decode(data).problems
    assert any("notes" in text and "sequence number 3" in text for text in problems)
    assert any("bulk" in text and "in a ring of 4096" in text for text in problems)
    assert any("host says that it is gone" in text for text in problems)


def test_a_byte_ring_shows_its_next_bytes_across_the_end() -> None:
    data = connected_page()
    bulk = HEADER.channels[1]
    data[bulk.data_ab + 4094 : bulk.data_ab + 4096] = b"ab"
    data[bulk.data_ab : bulk.data_ab + 2] = b"cd"
    control = bulk.offset + layout.RING_AB
    data[control : control + 8] = (4098).to_bytes(8, "little")
    data[control + layout.RING_HEAD : control + layout.RING_HEAD + 8] = (4094).to_bytes(8, "little")
    ring = dump.decode(data).channels[1].rings[0]
    assert (ring.filled, bytes.fromhex(ring.next[0].start)) == (4, b"abcd")


def test_an_error_and_a_truncated_file_are_told() -> None:
    data = page(error_code=7, error_by=layout.ERROR_BY_HOST, error_text="torn down")
    problems = dump.decode(data[:8192]).problems
    assert problems[0].startswith("the header page says 65536 bytes, here are 8192")
    assert "error 7 by the host: torn down" in problems
    assert any("beyond the end" in text for text in problems)


@settings(max_examples=200)
@given(st.binary(max_size=5000))
def test_no_bytes_make_it_fail(data: bytes) -> None:
    assert list(dump.lines(dump.decode(data)))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(0, 255)), max_size=60), st.integers(0, SIZE))
def test_no_scribble_over_a_region_makes_it_fail(scribble: list[tuple[int, int]], size: int) -> None:
    data = connected_page()
    for at, value in scribble:
        data[at] = value
    assert list(dump.lines(dump.decode(data[:size])))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_words_in_the_blocks_make_it_fail(data: st.DataObject) -> None:
    memory = connected_page()
    for entry in HEADER.channels:
        words = data.draw(st.lists(st.integers(0, (1 << 64) - 1), min_size=96, max_size=96))
        for index, word in enumerate(words):
            memory[entry.offset + 8 * index : entry.offset + 8 * index + 8] = word.to_bytes(8, "little")
    assert list(dump.lines(dump.decode(memory)))
