"""The header page: a plan comes back the same; broken bytes are one clear error."""

from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc import layout
from idc.layout import ChannelSpec, Kind, LayoutError, RegionHeader, Rights, pack_header, parse_header

if TYPE_CHECKING:
    from collections.abc import Callable

PAIR = {"front": Rights.RW, "back": Rights.RW}
MESSAGES = ChannelSpec("ctl", Kind.MESSAGE, "front", "back", 16 * 256, 256)
BYTES = ChannelSpec("data", Kind.BYTE, "front", "back", 1 << 18)


def link() -> RegionHeader:
    return RegionHeader.plan("link", 1 << 20, PAIR, [MESSAGES, BYTES], session=7)


def test_plan_packs_and_parses_to_the_same() -> None:
    header = link()
    page = pack_header(header)
    assert len(page) == layout.HEADER_BYTES
    assert parse_header(page, 1 << 20) == header


def test_plan_lays_channels_out_and_gives_the_rest_to_the_writers() -> None:
    header = link()
    ctl, data = header.channels
    assert (ctl.offset, ctl.data_ab, ctl.data_ba, ctl.length) == (4096, 8192, 12288, 12288)
    assert (ctl.data_vector, ctl.space_vector, data.data_vector, data.space_vector) == (1, 2, 3, 4)
    assert ctl.slots == 16
    assert data.offset == 16384
    assert header.vectors == 5
    first, second = header.parts
    assert first.offset == data.offset + data.length
    assert second.offset == first.offset + first.length
    assert [p.owner for p in header.parts] == [0, 1]
    assert second.offset + second.length <= header.size


def test_read_only_members_own_no_part() -> None:
    members = {"cache": Rights.RW, "vm1": Rights.RO, "vm2": Rights.RO}
    header = RegionHeader.plan("pages", 1 << 16, members)
    assert [(p.owner, p.length) for p in header.parts] == [(0, (1 << 16) - 4096)]
    assert header.vectors == 1


def test_parts_are_as_long_as_asked_and_side_by_side() -> None:
    header = RegionHeader.plan("link", 1 << 20, PAIR, [MESSAGES], parts={"back": 5 * 4096, "front": 4096})
    end = header.channels[0].offset + header.channels[0].length
    assert header.parts == (layout.Part(1, end, 5 * 4096), layout.Part(0, end + 5 * 4096, 4096))
    assert header.parts_of(0) == header.parts[1:]
    assert RegionHeader.plan("link", 1 << 20, PAIR, [MESSAGES], parts={}).parts == ()
    assert parse_header(pack_header(header)) == header


@pytest.mark.parametrize(("parts", "match"), [
    ({"side": 4096}, "no rw member"),
    ({"reader": 4096}, "no rw member of region 'link' .rw members: front, back"),
    ({"back": 0}, "whole pages"),
    ({"back": -4096}, "whole pages"),
    ({"back": 100}, "whole pages"),
    ({"back": 1 << 20}, r"1044480 are left"),
    ({"back": 1 << 19, "front": 1 << 19}, "left of 1048576"),
])
def test_parts_that_cannot_be(parts: dict[str, int], match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        RegionHeader.plan("link", 1 << 20, PAIR | {"reader": Rights.RO}, parts=parts)


def test_live_words_are_where_the_page_has_them() -> None:
    header = link()
    back = dataclasses.replace(header.members[1], incarnation=9, present=True)
    page = pack_header(dataclasses.replace(header, members=(header.members[0], back)))
    (word,) = struct.unpack_from("<Q", page, back.word_offset)
    assert word == layout.member_word(9, present=True)
    assert layout.split_member_word(word) == (9, True)
    assert parse_header(page).member("back") == back


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(LayoutError, match="front, back"):
        link().member("side")
    with pytest.raises(LayoutError, match="ctl, data"):
        link().channel("side")


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("power of two", {"size": 3 << 18}),
        ("power of two", {"size": 4096}),
        ("beyond the region", {"size": 1 << 18}),
        ("vectors", {"vectors": 0}),
        ("vectors", {"vectors": 257}),
        ("uses vector 4", {"vectors": 4}),
        ("region name", {"name": "a/b"}),
        ("region name", {"name": ""}),
        ("no range", {"protocol_min": 2}),
        ("does not fit", {"session": 1 << 64}),
    ],
)
def test_bad_region(match: str, change: dict[str, Any]) -> None:
    with pytest.raises(LayoutError, match=match):
        pack_header(dataclasses.replace(link(), **change))


@pytest.mark.parametrize(
    ("match", "spec"),
    [
        ("power of two", dataclasses.replace(BYTES, ring_bytes=12288)),
        ("power of two", dataclasses.replace(BYTES, ring_bytes=2048)),
        ("instead of 0", dataclasses.replace(BYTES, slot_size=64)),
        ("multiple of 64", dataclasses.replace(MESSAGES, slot_size=8)),
        ("multiple of 64", dataclasses.replace(MESSAGES, slot_size=100)),
        ("power of two", dataclasses.replace(MESSAGES, ring_bytes=3 * 256)),
        ("power of two", dataclasses.replace(MESSAGES, ring_bytes=256)),
        ("0 bytes", dataclasses.replace(MESSAGES, ring_bytes=0)),
        ("no member", dataclasses.replace(MESSAGES, a="nobody")),
        ("both sides", dataclasses.replace(MESSAGES, a="back")),
        ("not an rw member", dataclasses.replace(MESSAGES, b="reader")),
        ("channel name", dataclasses.replace(MESSAGES, name="x" * 33)),
    ],
)
def test_bad_channel(match: str, spec: ChannelSpec) -> None:
    with pytest.raises(LayoutError, match=match):
        RegionHeader.plan("link", 1 << 20, PAIR | {"reader": Rights.RO}, [spec])


def test_too_many_of_anything() -> None:
    with pytest.raises(LayoutError, match="members"):
        RegionHeader.plan("bus", 1 << 20, {f"m{i}": Rights.RW for i in range(17)})
    with pytest.raises(LayoutError, match="channels"):
        RegionHeader.plan("bus", 1 << 30, PAIR, [dataclasses.replace(BYTES, name=f"c{i}") for i in range(25)])


def poke(fmt: str, at: int, value: int | bytes) -> Callable[[bytearray], None]:
    return lambda page: struct.pack_into(fmt, page, at, value)


@pytest.mark.parametrize(
    ("match", "damage"),
    [
        ("magic", poke("<Q", 0, 0)),
        ("layout version 2", poke("<I", 8, 2)),
        ("4095", poke("<I", 12, 4095)),
        ("are mapped", poke("<Q", 96, 1 << 21)),
        ("members", poke("<I", 256, 0xFFFFFFFF)),
        ("channels", poke("<I", 260, 25)),
        ("parts", poke("<I", 264, 17)),
        ("has id 5", poke("<H", 512 + 8, 5)),
        ("unknown rights", poke("<H", 512 + 10, 3)),
        ("same name", poke("<6s", 512 + 64 + 16, b"front")),
        ("ASCII", poke("<2s", 512 + 16, b"\xff\xfe")),
        ("ASCII", poke("<B", 512 + 16 + 39, 1)),
        ("unknown kind", poke("<H", 1536 + 32, 9)),
        ("not an rw member", poke("<H", 1536 + 34, 99)),
        ("shares vector", poke("<H", 1536 + 64 + 38, 2)),
        ("page boundary", poke("<Q", 1536 + 40, 4097)),
        ("overlap", poke("<Q", 1536 + 40, 0)),
        ("overlap", poke("<Q", 1536 + 40, 8192)),
        ("beyond the region", poke("<Q", 1536 + 64 + 40, (1 << 64) - 4096)),
        ("rings of", poke("<Q", 1536 + 48, (1 << 64) - 4096)),
        ("owner 7", poke("<I", 3072, 7)),
        ("whole pages", poke("<Q", 3072 + 16, 0)),
    ],
)
def test_damaged_page(match: str, damage: Callable[[bytearray], None]) -> None:
    page = bytearray(pack_header(link()))
    damage(page)
    with pytest.raises(LayoutError, match=match):
        parse_header(page, 1 << 20)


def test_short_page() -> None:
    with pytest.raises(LayoutError, match="bytes instead of"):
        parse_header(b"IDC")


def test_error_text_is_cut_at_a_character() -> None:
    page = bytearray(pack_header(dataclasses.replace(link(), error_code=3, error_by=layout.ERROR_BY_HOST,
                                                     error_text="é" * 100)))  # fmt: skip
    assert parse_header(page).error_text == "é" * 64
    page[layout.ERROR_TEXT] = 0xFF  # torn while it was being written: never a reason to fail
    assert parse_header(page).error_text.startswith("�")


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=2 * layout.HEADER_BYTES))
def test_arbitrary_bytes_are_one_error(data: bytes) -> None:
    with pytest.raises(LayoutError):
        parse_header(data)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(8, 4095), st.integers(0, 255)), max_size=12))
def test_damaged_bytes_parse_or_are_one_error(damage: list[tuple[int, int]]) -> None:
    page = bytearray(pack_header(link()))
    for at, value in damage:
        page[at] = value
    try:
        header = parse_header(page)
    except LayoutError:
        return
    # What was accepted obeys every rule, so it can be packed again, and says the same.
    assert parse_header(pack_header(header)) == header


@settings(deadline=None)  # the machine may be busy
@given(
    st.sampled_from([1 << n for n in range(13, 31)]),
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), st.sampled_from(Rights), min_size=1, max_size=16
    ),
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(12, 20), st.integers(1, 16)), max_size=8),
)
def test_every_plan_that_is_accepted_is_disjoint(
    size: int, members: dict[str, Rights], rings: list[tuple[Kind, int, int]]
) -> None:
    writers = [name for name, rights in members.items() if rights is Rights.RW]
    specs = []
    if len(writers) >= 2:
        for i, (kind, bits, slot) in enumerate(rings):
            slot_size = 64 * slot if kind is Kind.MESSAGE else 0
            ring = slot_size * 16 if slot_size else 1 << bits
            specs.append(ChannelSpec(f"c{i}", kind, writers[0], writers[1], ring, slot_size))
    try:
        header = RegionHeader.plan("r", size, members, specs)
    except LayoutError as error:
        assert "beyond" in str(error)  # noqa: PT017 - too small is the only thing wrong with such a plan
        return
    assert parse_header(pack_header(header), size) == header
    spans = sorted([(c.offset, c.length) for c in header.channels] + [(p.offset, p.length) for p in header.parts])
    end = layout.HEADER_BYTES
    for offset, length in spans:
        assert offset >= end
        end = offset + length
    assert end <= size
